"""Wrong labels and consistency: one label in five of 1,000 digits is wrong, or in seven of other data; which, and does another seed say
the same?

python benchmarks/influence_labels.py [--quick] [--runs NAME …] [--only SCORE …]

Self-influence and margins from single runs of five seeds, next to peers on the same runs (EK-FAC needs the package kronfluence, and
cleanlab its own: `pip install -c constraints.txt -e ".[peers]"`). Writes benchmarks/results/influence_labels.json. What
`suspects()` ranks by was chosen by influence_labels_choice.py on other wrong labels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from influence_judge import DATA, JUDGES, Judge, Run, ekfac, example_gradients, single_run
from influence_tasks import TASKS, WRONG
from sklearn.model_selection import StratifiedKFold
from torch import Tensor
from torch.func import functional_call
from transformers.utils import logging as transformers_logging

from hf_unlearn.ensembles import train_ensemble


HERE = Path(__file__).parent
SEEDS = [21, 22, 23, 24, 25]
SHARES = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5]
RUNS = {
    "10 epochs of SGD": {"epochs": 10},
    "20 epochs of SGD": {"epochs": 20},
    "40 epochs of AdamW, by when most are known by heart": {
        "optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.01, "epochs": 40,
    },
}  # fmt: skip
OTHERS = [  # three seeds each, without the slow scores
    "wine, SGD",
    "wine, AdamW",
    "breast cancer, SGD",
    "breast cancer, AdamW",
    "fortunes, SGD",
    "fortunes, AdamW",
]
FOLDS = 5


def flat_gradients(judge: Judge, parameters: dict[str, Tensor]) -> Tensor:
    network = DATA[judge.settings.data].network()
    gradients = example_gradients(network, parameters, judge.x, judge.labels)
    return torch.cat([value.flatten(1) for value in gradients.values()], dim=1)


def tracin_own(judge: Judge, run: Run) -> Tensor:
    """Σ over checkpoints of η‖∇ℓ_i‖², a checkpoint an epoch."""
    return sum(judge.settings.lr * flat_gradients(judge, state["parameters"]).square().sum(1) for state in run.states)


def trak_own(judge: Judge, run: Run) -> Tensor:
    """TRAK's formula (arXiv 2303.14186) with one model and no projection: x_i = ∇ log(p/(1−p)), x_iᵀ(XᵀX + 1)⁻¹x_i·(1−p_i)."""
    network, parameters = DATA[judge.settings.data].network(), run.states[-1]["parameters"]

    def margin(values, one, label):
        log_p = -F.cross_entropy(functional_call(network, values, (one[None],)), label[None])
        return log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))

    gradients = torch.func.vmap(torch.func.grad(margin), (None, 0, 0), chunk_size=250)(
        parameters, judge.x, judge.labels
    )
    x = torch.cat([value.flatten(1) for value in gradients.values()], dim=1).double()
    gram = x @ x.T
    leverage = torch.linalg.solve(gram + torch.eye(len(x), dtype=gram.dtype), gram).diagonal()  # x(XᵀX + 1)⁻¹xᵀ
    with torch.no_grad():
        p = functional_call(network, parameters, (judge.x,)).softmax(-1).gather(1, judge.labels[:, None])[:, 0]
    return leverage.float() * (1 - p)


def mean_loss(judge: Judge, run: Run) -> Tensor:
    """Mean training loss over checkpoints: no influence at all, but what everybody can compute."""
    network, total = DATA[judge.settings.data].network(), 0
    with torch.no_grad():
        for state in run.states:
            logits = functional_call(network, state["parameters"], (judge.x,))
            total = total + F.cross_entropy(logits, judge.labels, reduction="none")
    return total


def cleanlab_scores(judge: Judge, seed: int) -> dict[str, Tensor]:
    """cleanlab's label quality from probabilities of models that did not see the row: five folds, trained as the run was."""
    from cleanlab.rank import get_label_quality_scores

    settings, labels = judge.settings, judge.labels.numpy()
    make = DATA[settings.data].network
    folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(labels, labels))
    state = train_ensemble(
        lambda _: make(), judge.x, judge.labels, [torch.from_numpy(kept) for kept, _ in folds],
        [seed * 100 + fold for fold in range(FOLDS)], batch_size=settings.batch_size, lr=settings.lr,
        optimizer=settings.optimizer, weight_decay=settings.weight_decay, epochs=settings.epochs,
    )  # fmt: skip
    p = np.zeros((len(labels), judge.classes))
    with torch.no_grad():
        for fold, (_, out) in enumerate(folds):
            logits = functional_call(make(), {name: value[fold] for name, value in state.items()}, (judge.x[out],))
            p[out] = logits.softmax(-1).numpy()
    names = {"normalized_margin": "normalised margin", "self_confidence": "self-confidence"}
    return {
        f"cleanlab, {FOLDS} folds, {name}": -torch.tensor(get_label_quality_scores(labels, p, method=method))
        for method, name in names.items()
    }


def scores_of(judge: Judge, seed: int, only: list[str] | None) -> dict[str, Tensor]:
    """Scores of every example, of runs that are the same training; `only` those that begin with one of these words."""

    def wanted(name: str) -> bool:
        return only is None or name.startswith(tuple(only))

    with tempfile.TemporaryDirectory() as folder:
        run = single_run(judge, seed, f"{folder}/run", target="self", observation="in_run")
        found = {
            "suspects(): mean margin": lambda: -torch.tensor(run.report.observations.mean_margin()),
            "f-INE, in_run": lambda: torch.tensor(run.report.dataset["mu"][:]),
            "TracIn": lambda: tracin_own(judge, run),
            "squared gradient norm at the end": lambda: (
                flat_gradients(judge, run.states[-1]["parameters"]).square().sum(1)
            ),
            "mean loss": lambda: mean_loss(judge, run),
            "loss at the end": lambda: mean_loss(judge, replace(run, states=run.states[-1:])),
            "random": lambda: torch.rand(len(judge.x), generator=torch.Generator().manual_seed(seed)),
        }
        if judge.settings.data == "digits":
            found |= {
                "EK-FAC influence": lambda: ekfac(judge, run, folder, own=True),
                "TRAK's formula, one model": lambda: trak_own(judge, run),
            }
        scores = {name: score() for name, score in found.items() if wanted(name)}
        if judge.settings.data == "digits" and wanted("f-INE, propagated"):
            own = single_run(judge, seed, f"{folder}/own", target="self", observation="propagated", target_every=20)
            assert torch.equal(run.states[-1]["parameters"]["out.bias"], own.states[-1]["parameters"]["out.bias"])
            scores["f-INE, propagated"] = torch.tensor(own.report.dataset["mu"][:])
    return scores | (cleanlab_scores(judge, seed) if wanted("cleanlab") else {})


def tops(values: Tensor, share: float) -> set[int]:
    return set(values.argsort(descending=True)[: round(share * len(values))].tolist())


def measure(name: str, seeds: list[int], only: list[str] | None) -> dict:
    if name in RUNS:
        judge = Judge.load(replace(JUDGES["digits, SGD"], **RUNS[name]))
    else:
        judge = Judge.load(TASKS[name], WRONG)
    wrong = set(judge.wrong.nonzero().flatten().tolist())
    runs = []
    for seed in seeds:
        runs.append(scores_of(judge, seed, only))
        print(name, "seed", seed, flush=True)
    found = {}
    for score in runs[0]:
        values = [run[score] for run in runs]
        found[score] = {
            "recall": {
                share: [len(tops(value, share) & wrong) / len(wrong) for value in values] for share in (0.1, 0.2, 0.3)
            },
            # of as many as there are wrong labels
            "precision": [len(tops(value, len(wrong) / len(value)) & wrong) / len(wrong) for value in values],
            "jaccard": {
                share: float(
                    np.mean(
                        [
                            len(a & b) / len(a | b)
                            for a, b in itertools.combinations([tops(value, share) for value in values], 2)
                        ]
                    )
                )
                for share in SHARES
            } if len(values) > 1 else {},
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two seeds, ten epochs; writes nothing")
    parser.add_argument("--runs", nargs="+", choices=[*RUNS, *OTHERS], default=[*RUNS, *OTHERS])
    parser.add_argument("--only", nargs="+", help="first words of scores; the others stay as they are in the file")
    arguments = parser.parse_args()
    quick, file = arguments.quick, HERE / "results" / "influence_labels.json"
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    result = {"seeds": SEEDS, "runs": {}} if quick or not file.is_file() else json.loads(file.read_text())
    for name in list(RUNS)[:1] if quick else arguments.runs:
        seeds = SEEDS[:2] if quick else SEEDS if name in RUNS else SEEDS[:3]
        found = measure(name, seeds, arguments.only)
        kept = result["runs"].get(name, {}) if arguments.only else {}
        result["runs"][name] = json.loads(json.dumps(kept | found))
        if not quick:
            file.write_text(json.dumps(result, indent=1) + "\n")
    for name, found in result["runs"].items():
        print(name)
        for score, row in found.items():
            curve = "  ".join(f"{100 * float(share):.0f} % {value:.2f}" for share, value in row["jaccard"].items())
            print(f"  {score:34} recall at 20 % {np.mean(row['recall']['0.2']):.3f}   Jaccard {curve}")


if __name__ == "__main__":
    main()
