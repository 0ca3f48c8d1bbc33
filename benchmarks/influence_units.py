"""Is μ's unit right, and do its intervals cover? On twelve tasks, judged by retraining.

python benchmarks/influence_units.py [--tasks NAME …] [--seeds N …] [--quick]

Single runs of `InfluenceTrainer` on each task of influence_tasks.py (kept in the cache, as the brute force is), with and without eight
calibration runs. The width of intervals is chosen on eleven tasks and reported on the twelfth. Writes results/influence_units.json.
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
from influence_judge import CACHE, DATA, Judge, single_run
from influence_tasks import TASKS, load
from scipy.stats import pearsonr, spearmanr
from transformers.utils import logging as transformers_logging

from hf_unlearn.brute_force import BruteForceMu, disattenuated
from hf_unlearn.ensembles import ensemble_losses, train_ensemble
from hf_unlearn.influence.calibration import calibrated, influential
from hf_unlearn.influence.propagated.optimizers import FlatOptimizer
from hf_unlearn.influence.report.report import InfluenceReport
from hf_unlearn.influence.report.unit import widened


HERE = Path(__file__).parent
SEEDS = [31, 32, 33]
CALIBRATION_RUNS = 8
WIDTHS = [
    (relative, absolute) for relative in np.arange(0.05, 1.05, 0.05) for absolute in (0.0, 0.1, 0.2, 0.3, 0.4, 0.6)
]
WANTED, LEAST = 0.93, 0.85  # coverage on the tasks that widths are chosen on: on average, and on each
KINDS = ("propagated", "propagated, calibrated", "in_run, calibrated", "in_run")


def grid(rows, column: str, groups: int, targets: int) -> np.ndarray:
    """`[groups, targets]` of a report's group table, which is by target."""
    return np.array(rows[column][:]).reshape(targets, groups).T


def losses_of(judge: Judge, members: list[torch.Tensor], seeds: list[int]) -> np.ndarray:
    """What calibration runs would find, all at once: `[runs, targets]`."""
    settings, make = judge.settings, DATA[judge.settings.data].network
    state = train_ensemble(
        lambda _: make(), judge.x, judge.labels, members, seeds, batch_size=settings.batch_size, lr=settings.lr,
        optimizer=settings.optimizer, weight_decay=settings.weight_decay, max_steps=settings.steps,
    )  # fmt: skip
    return ensemble_losses(
        lambda _: make(), state, judge.test_x, judge.test_labels, judge.test_labels
    ).double().numpy()  # fmt: skip


def noise_only(report: InfluenceReport, members: dict, targets: int) -> dict[str, np.ndarray]:
    """μ and the bounds of its noise alone, `[groups, targets]`."""
    rows = replace(report, manifest={}).group(members, n_resamples=300)
    return {name: grid(rows, name, len(members), targets) for name in ("mu", "mu_low", "mu_high")}


class Growth:
    """Largest ‖λ_t‖ over the sweep, over that at its beginning."""

    def __init__(self):
        self.norms: list[float] = []

    def __enter__(self):
        self.adjoint = FlatOptimizer.adjoint
        norms, adjoint = self.norms, self.adjoint

        def watched(optimizer, state, gradient, settings, cotangents):
            norms.append(cotangents[0][len(cotangents[0]) // 2 :].norm().item())
            return adjoint(optimizer, state, gradient, settings, cotangents)

        FlatOptimizer.adjoint = watched
        return self

    def __exit__(self, *error):
        FlatOptimizer.adjoint = self.adjoint


def measured(name: str, seed: int) -> dict:
    """What single runs of one seed say, by kind; cached."""
    file = CACHE / f"influence-units-{name}-{seed}.pt"
    if file.is_file():
        return torch.load(file, weights_only=False)
    judge, groups = load(name)
    members, targets, found = by_name(groups), judge.classes, {}
    for observation in ("propagated", "in_run"):
        with tempfile.TemporaryDirectory() as folder, Growth() as growth:
            report = single_run(judge, seed, folder, observation=observation).report
        used = report.observations.since(report.burn_in)
        plain = noise_only(report, members, targets) | {"sigma": used.sigma, "error": 0.0, "gain": 1.0}
        plain["example_mu"] = used.example_mu().mu
        if observation == "propagated":
            plain["independent"] = np.sqrt(used.independent_variance.sum(0))
            plain["order"] = replace(used, start=None).sigma
            plain["norms"] = np.array(growth.norms)
        found[observation] = plain
        generator, everything = np.random.default_rng(seed), np.arange(len(judge.x))
        left_out = [
            influential(used, generator) if run % 2 and observation == "in_run" else everything[:0]
            for run in range(CALIBRATION_RUNS)
        ]  # fmt: skip
        kept = [torch.from_numpy(np.setdiff1d(everything, group)) for group in left_out]
        seeds = [800_000 + 100 * seed + run for run in range(CALIBRATION_RUNS)]
        facts = calibrated(used, losses_of(judge, kept, seeds), left_out)
        gain = facts.get("gain", np.nan if observation == "in_run" else 1.0)
        factor = gain / facts["scale"]
        found[f"{observation}, calibrated"] = {
            **{key: factor * plain[key] for key in ("mu", "mu_low", "mu_high")},
            "sigma": facts["scale"] * used.sigma, "error": facts["unit_error"], "gain": gain,
        }  # fmt: skip
    torch.save(found, file)
    return found


# Judged


def meets(
    run: dict, truth: BruteForceMu, relative: float, absolute: float, *, with_unit: bool = True
) -> tuple[float, float]:
    """Share of groups and targets whose true μ is within the interval, the brute force's own error added, and its median width."""
    mu, low, high = run["mu"], run["mu_low"], run["mu_high"]
    if with_unit:
        low, high = widened(mu, low, high, {"unit_error": run["error"]}, 0.95, widths=(relative, absolute))
    gap, error = truth.mu.numpy() - mu, 1.96 * truth.standard_error.numpy()
    inside = (gap >= -np.hypot(mu - low, error)) & (gap <= np.hypot(high - mu, error))
    return float(inside.mean()), float(np.median(high - low))


def covered(runs: dict, truths: dict, kind: str) -> dict[str, np.ndarray]:
    """By task, `[widths, 2]`: share that is met and median width, of each of `WIDTHS`."""
    return {
        name: np.mean([[meets(run[kind], truths[name], *widths) for widths in WIDTHS] for run in of_task], axis=0)
        for name, of_task in runs.items()
        if all(np.isfinite(run[kind]["mu"]).all() for run in of_task)
    }


def chosen(table: dict[str, np.ndarray], without: str | None = None) -> tuple[float, float]:
    """The narrowest widths that cover on average over all tasks but one, and on none of them much less."""
    share, width = np.stack([each for name, each in table.items() if name != without]).transpose(2, 0, 1)
    enough = (share.mean(0) >= WANTED) & (share.min(0) >= LEAST)
    return WIDTHS[int(np.where(enough, width.mean(0), np.inf).argmin())] if enough.any() else WIDTHS[-1]


def agreement(run: dict, truth: BruteForceMu) -> dict[str, float]:
    x, y = run["mu"].ravel(), truth.mu.numpy().ravel()
    order = spearmanr(x, y)[0]
    return {
        "spearman": order,
        "disattenuated": disattenuated(order, truth.reliability),
        "pearson": pearsonr(x, y)[0],
        "slope": float(x @ y / (y @ y)),
    }


def judged(runs: dict, truths: dict) -> dict:
    result = {"tasks": {}, "widths": {}}
    tables = {kind: covered(runs, truths, kind) for kind in KINDS[:3]}
    for kind, table in tables.items():
        result["widths"][kind] = [float(value) for value in chosen(table)]
    for name, of_task in runs.items():
        truth, row = truths[name], {}
        sd = truth.with_losses.std(0).numpy()
        for kind in KINDS:
            known = [run[kind] for run in of_task if np.isfinite(run[kind]["mu"]).all()]
            if not known:
                row[kind] = {"order_only": len(of_task)}
                continue
            ratios = np.stack([run["sigma"] / sd for run in known])
            facts = [agreement(run, truth) for run in known]
            row[kind] = {key: float(np.mean([fact[key] for fact in facts])) for key in facts[0]}
            row[kind] |= {
                "order_only": len(of_task) - len(known),
                "sigma_ratio": float(np.exp(np.log(ratios).mean())),
                "sigma_within_1.3": float((np.abs(np.log(ratios)) <= np.log(1.3)).mean()),
                "gain": float(np.mean([run["gain"] for run in known])),
            }
            if kind != "in_run":
                widths = chosen(tables[kind], name)
                share, width = np.mean([meets(run, truth, *widths) for run in known], axis=0)
                row[kind] |= {"widths": [float(value) for value in widths], "coverage": float(share)}
                row[kind] |= {"width": float(width)}
                row[kind]["coverage_of_noise"] = float(
                    np.mean([meets(run, truth, 0, 0, with_unit=False)[0] for run in known])
                )
        for key in ("independent", "order"):
            ratios = np.stack([run["propagated"][key] / sd for run in of_task])
            row[f"sigma, {key}"] = float(np.exp(np.log(ratios).mean()))
        pairs = list(itertools.combinations([run["propagated"]["mu"].ravel() for run in of_task], 2))
        row["agreement_of_seeds"] = float(np.mean([spearmanr(a, b)[0] for a, b in pairs])) if pairs else None
        row["growth"] = float(
            np.mean([run["propagated"]["norms"].max() / run["propagated"]["norms"][0] for run in of_task])
        )
        result["tasks"][name] = row | {"reliability": truth.reliability, "groups": len(truth.mu), "targets": len(sd)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="two small tasks, one seed; writes nothing")
    parser.add_argument("--only_measure", action="store_true", help="fill the cache")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    names = ["wine, SGD", "breast cancer, SGD"] if arguments.quick else arguments.tasks
    seeds = SEEDS[:1] if arguments.quick else arguments.seeds
    runs: dict[str, list[dict]] = {name: [] for name in names}
    for seed, name in itertools.product(seeds, names):
        runs[name].append(measured(name, seed))
        print(name, seed, flush=True)
    if arguments.only_measure:
        return
    truths = {}
    for name in names:
        judge, groups = load(name)
        truths[name] = judge.brute_force(groups)
    result = {"seeds": seeds, "calibration_runs": CALIBRATION_RUNS, "wanted": WANTED, **judged(runs, truths)}
    print(json.dumps(result, indent=1))
    if not arguments.quick and len(names) == len(TASKS):
        (HERE / "results" / "influence_units.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
