"""What `report.suspects()` ranks by, chosen on wrong labels that influence_labels.py does not report on.

python benchmarks/influence_labels_choice.py

Digits with other wrong labels, trained as in influence_labels.py. Prints, for each training, how many of the wrong labels are among as
many examples that come first, and the average precision: losses, margins, self-influence, and margins and losses with self-influence
added (what they would be had the example not been trained on).
"""

from __future__ import annotations

import tempfile
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from influence_judge import CLASSES, DATA, JUDGES, Judge, single_run
from influence_labels import RUNS
from sklearn.metrics import average_precision_score
from torch.func import functional_call
from transformers.utils import logging as transformers_logging


SEEDS = [101, 102]  # of the wrong labels and of the run


def with_other_wrong_labels(judge: Judge, seed: int) -> Judge:
    _, labels, _, _ = DATA["digits"].load(len(judge.x))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: len(labels) // 5]
    labels[chosen] = (labels[chosen] + torch.randint(1, CLASSES, (len(chosen),), generator=generator)) % CLASSES
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[chosen] = True
    return replace(judge, labels=labels, wrong=wrong)


def scores_of(judge: Judge, seed: int) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        run = single_run(judge, seed, folder, target="self", observation="in_run")
    network, labels = DATA["digits"].network(), judge.labels
    with torch.no_grad():
        logits = torch.stack([functional_call(network, state["parameters"], (judge.x,)) for state in run.states])
    log_p = logits.log_softmax(-1)
    one_hot = F.one_hot(labels, CLASSES).bool()
    own = log_p[:, one_hot].numpy()  # [epochs, rows]
    other = log_p.masked_fill(one_hot, -torch.inf).amax(-1).numpy()
    loss, of_logits, of_p = -own, other - own, np.exp(other) - np.exp(own)
    observed = run.report.observations
    influence = np.bincount(observed.example, observed.signals()[:, 0], len(labels))  # δ(self), in nats
    late = slice(len(loss) // 2, None)
    scores = {
        "loss at the end": loss[-1], "mean loss": loss.mean(0), "median loss": np.median(loss, 0),
        "self-influence": influence, "margin of logits at the end": of_logits[-1], "margin of logits": of_logits.mean(0),
        "margin of logits, second half": of_logits[late].mean(0), "margin of p at the end": of_p[-1],
        "margin of p": of_p.mean(0), "margin of p, second half": of_p[late].mean(0),
        "margin of p while training (suspects())": -observed.mean_margin(),
    }  # fmt: skip
    for factor in (1, 2, 4):
        scores[f"loss at the end + {factor} self-influence"] = loss[-1] + factor * influence
        scores[f"margin of logits at the end + {factor} self-influence"] = of_logits[-1] + factor * influence
        scores[f"margin of logits + {factor} self-influence"] = of_logits.mean(0) + factor * influence
    return scores


def main() -> None:
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    table: dict[str, list[tuple[float, float]]] = {}
    for changes in RUNS.values():
        for seed in SEEDS:
            judge = with_other_wrong_labels(Judge.load(replace(JUDGES["digits, SGD"], **changes)), seed)
            wrong = judge.wrong.numpy()
            for score, values in scores_of(judge, seed).items():
                first = np.argsort(-values)[: wrong.sum()]
                table.setdefault(score, []).append((wrong[first].mean(), average_precision_score(wrong, values)))
    print(f"{'':54}" + "   ".join(f"{name[:18]:18}" for name in RUNS))
    for score, found in sorted(table.items(), key=lambda item: -np.mean(item[1])):
        each = np.array(found).reshape(len(RUNS), len(SEEDS), 2).mean(1)
        print(f"{score:54}" + "   ".join(f"{share:.3f} (AP {precision:.3f})  " for share, precision in each))


if __name__ == "__main__":
    main()
