"""Rate of PBU's defaults and weight of what `sever` asks of features: chosen by what an audit says, on models of no table.

    python benchmarks/sever_choice.py [--quick]

Digits of other seeds and classes than those of audit_power.py, judged on the validation images, beside six retrained models a class. Of each audit counts the check
whose distance takes most of its margin, at its upper end; chosen is the least mean of that, and of what is nearly level (weights 0.3 to 3 at 2e-4) the smallest weight, which asks least of the rest.
Results go to benchmarks/results/sever_choice.json as they are found, the table to
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import product
from pathlib import Path
from unittest.mock import patch

from audit_power import World, part
from class_unlearning import unlearn
from fashion_mnist import CACHE
from rows import QUIET, keep, rounded
from torch import nn
from transformers.utils import logging as transformers_logging

from hf_unlearn import PBUConfig, PBUTrainer
from hf_unlearn.unlearning.classifiers import sever


RESULTS = Path(__file__).parent / "results" / "sever_choice.json"
JOBS = ((5, 0), (6, 4), (5, 6), (6, 9))  # seeds and classes
RATES, WEIGHTS = (2e-4, 5e-4), (0.0, 0.1, 0.3, 1.0, 3.0)


class ChoiceWorld(World):
    """Models of the choice; `quick` are few rows."""

    folder = CACHE / "sever"

    def __init__(self, quick: bool = False):
        super().__init__(quick)
        self.splits = self.splits | {"test": self.splits["validation"]}
        self._read()


def forgotten_by(world: World, seed: int, forgotten: int, rate: float, weight: float) -> nn.Module:
    model = world.original(seed)
    with tempfile.TemporaryDirectory() as folder, patch.object(sever, "WEIGHT", weight):
        config = PBUConfig(folder, seed=seed, learning_rate=rate, **QUIET)
        unlearn(PBUTrainer, config, model, part(world.splits["train"], forgotten, True))
    return model.eval()


def measured(world: World, seed: int, forgotten: int, rate: float, weight: float) -> dict:
    model = forgotten_by(world, seed, forgotten, rate, weight)
    report = world.audited(model, seed, forgotten, list(range(world.references)))
    found = {one.name: one for one in report.results}
    # How much of its margin each check's distance takes, at its upper end; some twenty validation images of a class are too few to tell of them alone.
    taken = {name: one.high / one.margin for name, one in found.items() if one.margin and name != "unseen_accuracy"}
    worst = max(taken, key=taken.get)
    return {
        "rate": rate, "weight": weight, "seed": seed, "class": forgotten, "verdict": report.verdict.word, "worst": worst, "taken": taken[worst],
        **{name: found[name].audited for name in ("refitted_head", "relearn_forget", "relearn_retained", "unseen_error")},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one job, few rows, the default alone: writes nothing")
    quick = parser.parse_args().quick
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    world = ChoiceWorld(quick)
    if quick:
        print(measured(world, *JOBS[0], PBUConfig.learning_rate, sever.WEIGHT))
        return
    for (seed, forgotten), rate, weight in product(JOBS, RATES, WEIGHTS):
        row = rounded(measured(world, seed, forgotten, rate, weight))
        print(row, flush=True)
        keep(RESULTS, [row], ("rate", "weight", "seed", "class"))


if __name__ == "__main__":
    main()
