"""Do three trainings say beforehand whether `propagated` will be right?

    python benchmarks/influence_smoothness.py [--tasks NAME …] [--quick]

The tasks of influence_tasks.py, each with the learning rate that they have and with larger ones, up to far too large. For each: μ by
retraining without groups of rows, its Spearman with μ of single runs of `propagated`, and the smoothness of trainings from the same starts,
of the losses of the target examples and of the parameters. Rows are kept as they are measured. Ten minutes of one thread. Results: benchmarks/results/influence_smoothness.json.
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
from influence_fidelity import by_name
from influence_judge import Judge, trainer_of
from influence_tasks import MOST_GROUPS, TASKS, load
from influence_units import grid
from rows import keep, rounded
from scipy.stats import spearmanr
from transformers.utils import logging

from hf_unlearn import InfluenceTrainer
from hf_unlearn.influence.smoothness import agreement, trained_along


RESULTS = Path(__file__).parent / "results" / "influence_smoothness.json"
SEEDS, RUNS = (41,), 40
MORE_RUNS = {"digits, one epoch": 100}  # where 40 tell nothing
TIMES = (1, 5, 20)  # the task's learning rate
# Of h, the share of the rows that are moved, and that of the steps.
KINDS = {"a tenth of the rows": (-0.5, 0.1, 1.0), "half of the rows": (-0.5, 0.5, 1.0), "half of the rows, quarter of the steps": (-0.5, 0.5, 0.25)}  # fmt: skip


class Ordered(InfluenceTrainer):
    """σ of the sweep is read off one batch: it is one number a target."""

    def _panel_rows(self):
        return super()._panel_rows()[:1]


def smoothness_of(judge: Judge, seed: int) -> dict[str, float]:
    """By what is compared and how; −1 where a training diverges."""
    found = {}
    for name, (h, share, part) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(judge, seed, folder, observation="propagated")
            steps = max(1, round(part * judge.settings.steps))
            try:
                both = trained_along(trainer, steps=steps, share=share, h=h, seed=seed)
                values = [agreement(*outcome.diff(dim=0)) for outcome in both]
            except FloatingPointError:
                values = [-1.0, -1.0]
        found |= {f"losses, {name}": values[0], f"parameters, {name}": values[1]}
    return found


def single_mu(judge: Judge, groups: list[np.ndarray], seed: int) -> np.ndarray | None:
    """`[groups, targets]` of one run; None where there is no report."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(judge, seed, folder, observation="propagated", kind=Ordered)
        try:
            trainer.train()
        except FloatingPointError:
            return None
        members = by_name(groups)
        rows = replace(trainer.influence, manifest={}).group(members, n_resamples=2)
    return grid(rows, "mu", len(members), judge.classes)


def order(a: np.ndarray, b: np.ndarray) -> float:
    return float(spearmanr(a.ravel(), b.ravel())[0])


def measured(name: str, times: float, runs: int, seeds: tuple[int, ...]) -> dict:
    judge, groups = load(name)
    judge = replace(judge, settings=replace(judge.settings, lr=times * judge.settings.lr))
    groups = groups[:: -(-len(groups) // MOST_GROUPS)]
    row = {"task": name, "times": times, "lr": judge.settings.lr, "seeds": list(seeds), "runs": runs}
    row["smoothness"] = [smoothness_of(judge, seed) for seed in seeds]
    try:
        truth = judge.brute_force(groups, runs)
    except ValueError as error:  # runs diverged, or never differ
        return row | {"failed": str(error)}
    sd = truth.with_losses.std(0).numpy()
    row |= {"reliability": truth.reliability, "loss": float(truth.with_losses.mean()), "sd": float(sd.mean())}
    found, wanted = [single_mu(judge, groups, seed) for seed in seeds], truth.mu.numpy()
    row["spearman"] = [None if mu is None else order(mu, wanted) for mu in found]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--times", type=float, nargs="+", default=TIMES)
    parser.add_argument("--quick", action="store_true", help="one task; writes nothing")
    given = parser.parse_args()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    tasks, times = (["wine, SGD"], [1, 20]) if given.quick else (given.tasks, given.times)
    for name, rate in itertools.product(tasks, times):
        runs = 10 if given.quick else MORE_RUNS.get(name, RUNS)
        row = rounded(measured(name, rate, runs, SEEDS))
        print(json.dumps(row), flush=True)
        if not given.quick:
            keep(RESULTS, [row], ("task", "times"))


if __name__ == "__main__":
    main()
