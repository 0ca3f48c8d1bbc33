"""What each part of forgetting a class costs and earns: PBU's defaults on digits, with one part more or less at a time.

    python benchmarks/forgetting_cost.py [--quick]

Three jobs each: three originals of other seeds than those of class_unlearning.py, one class of each, judged on the validation images, which the
defaults were chosen on. Time is the processor time of the process, on one thread, in units of retraining without the class, which is done once in
the same run. What is relearnt: the audit's check that goes on training with retained rows alone, for 20 steps; of an audit too
is the membership by loss (AUC; 0.5 is none). Results go to benchmarks/results/forgetting_cost.json as they are found.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from class_unlearning import FORMER, Digits, answers, part, stock_training, unlearn
from rows import QUIET
from transformers.utils import logging as transformers_logging

from hf_unlearn import PBUConfig, PBUTrainer
from hf_unlearn.audit.classifiers.data import classifier_data
from hf_unlearn.audit.classifiers.membership import MembershipByLoss
from hf_unlearn.audit.classifiers.relearning import RelearnRetained
from hf_unlearn.audit.classifiers.subject import ClassifierSubject
from hf_unlearn.examples.classifier import TRAINING, digits_model


RESULTS = Path(__file__).parent / "results" / "forgetting_cost.json"
JOBS = {0: (4,), 1: (6,), 2: (3,)}  # seed: classes
VARIANTS = {
    "former defaults": FORMER | {"num_train_epochs": 20.0, "guard_steps": 2},
    "defaults": {},
    "with the Fisher anchor": {"fisher_weight": 0.14},
    "without the isotropic anchor": {"isotropic_weight": 0.0},
    "without replay": {"replay_weight": 0.0},
    "redirect alone: features and row left as they are": {"forget_loss": "redirect"},
    "half the steps": {"max_steps": 20, "guard_steps": 10},
    "batches of 64, half the steps": {"per_device_train_batch_size": 64, "max_steps": 20, "guard_steps": 10},
}
PARTS = {  # what is timed within a job: methods of the trainer, and their name
    "_compute_fisher": "Fisher",
    "utility": "looks: utility",
    "remembered": "looks: forgotten",
    "judge": "judged at the end",
    "forget_loss": "forget loss, forward",
    "replay_loss": "replay loss, forward",
    "training_step": "step",
    "get_batch_samples": "batches",
}


@contextmanager
def timed(trainer_class: type) -> Iterator[dict[str, float]]:
    """Seconds of processor time by part; one within another counts for the inner one."""
    spent: dict[str, float] = defaultdict(float)
    stack: list[float] = []

    def wrapped(method, name):
        def call(*args, **kwargs):
            stack.append(0.0)
            started = time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                took = time.process_time() - started
                spent[name] += took - stack.pop()
                if stack:
                    stack[-1] += took

        return call

    with ExitStack() as patches:
        for method, name in PARTS.items():
            patches.enter_context(patch.object(trainer_class, method, wrapped(getattr(trainer_class, method), name)))
        yield spent


def measured(data: Digits, seed: int, forgotten: int, settings: dict, retraining: float) -> dict:
    forget, retain = (part(data.splits["train"], forgotten, inside) for inside in (True, False))
    model = data.original(seed)
    with tempfile.TemporaryDirectory() as folder, timed(PBUTrainer) as spent:
        started = time.process_time()
        cost = unlearn(PBUTrainer, PBUConfig(folder, seed=seed, **QUIET, **settings), model, forget)
        seconds = time.process_time() - started
    model.eval()
    audited = classifier_data(
        forget, retain, data.splits["validation"], num_labels=10, processing_class=None, size="standard", seed=0
    )
    subject = ClassifierSubject(model, "audited", "unlearned")
    spent["everything else"] = seconds - sum(spent.values())
    return {
        "seed": seed,
        "class": forgotten,
        **{k: v for k, v in data.score(answers(model, data.images["validation"]), "validation", forgotten).items() if k != "per_class"},
        "relearnt": RelearnRetained().read(subject, audited, 0).value,
        "membership": MembershipByLoss().read(subject, audited, 0).value,
        "steps": cost["steps"],
        "passes": cost["passes"],
        "time": seconds / retraining,
        "parts": {name: value / retraining for name, value in spent.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one job each of the first two; writes nothing")
    quick = parser.parse_args().quick
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    data, found = Digits(), {"originals": [], "rows": []}
    seed, (forgotten, *_) = next(iter(JOBS.items()))
    retrained = stock_training(digits_model(seed + 1000), part(data.splits["train"], forgotten, False), seed, TRAINING)
    for seed, classes in list(JOBS.items())[: 1 if quick else None]:
        original = data.original(seed)
        for forgotten in classes[: 1 if quick else None]:
            score = data.score(answers(original, data.images["validation"]), "validation", forgotten)
            found["originals"].append(
                {"seed": seed, "class": forgotten, **{k: score[k] for k in ("forget", "retain")}}
            )
            for name, settings in list(VARIANTS.items())[: 2 if quick else None]:
                row = measured(data, seed, forgotten, settings, retrained["seconds"])
                row["passes"] /= retrained["passes"]
                found["rows"].append({"variant": name, **row})
                print(json.dumps(found["rows"][-1]), flush=True)
                if not quick:
                    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for name in VARIANTS:
        rows = [row for row in found["rows"] if row["variant"] == name]
        if rows:
            means = {
                key: statistics.mean(row[key] for row in rows)
                for key in ("forget", "retain", "relearnt", "membership", "passes")
            }
            print(name, means, "time", statistics.median(row["time"] for row in rows))


if __name__ == "__main__":
    main()
