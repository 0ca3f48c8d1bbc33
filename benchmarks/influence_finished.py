"""How well influence on a model that is already trained agrees with retraining, beside what watches the training, in one run.

python benchmarks/influence_finished.py [--quick]

The judges of influence_fidelity.py (their brute force is cached). From each run's checkpoints, one an epoch, or from its last state alone:
`attribute`, the index at several sizes, and beside them `propagated`, `in_run`, TracIn and EK-FAC by kronfluence
(`pip install -c constraints.txt -e ".[peers]"`). Then what an index takes; faiss is compared where it is installed.
Writes benchmarks/results/influence_finished.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from influence_fidelity import SEEDS, agreement, by_name, coverage, grid, summarised
from influence_judge import (
    DATA,
    JUDGES,
    Judge,
    Labelled,
    Rows,
    Run,
    class_targets,
    ekfac,
    group_scores,
    single_run,
    tracin,
)
from transformers.utils import logging as transformers_logging

from hf_unlearn import InfluenceConfig, InfluenceIndex, attribute


HERE = Path(__file__).parent
NAMES = ("digits, SGD", "digits, AdamW")
INDICES = {
    "index, whole": (None, False),
    "index, 32 a side": (32, False),
    "index, 16 a side": (16, False),
    "index, 8 a side": (8, False),
    "index, 16 a side, random": (16, True),
}
REPEATED = 20  # the training set, in the index whose queries are timed
QUERIES = 1000


def config(folder: str) -> InfluenceConfig:
    return InfluenceConfig(
        output_dir=folder, use_cpu=True, report_to="none", max_grad_norm=0, per_device_eval_batch_size=250, disable_tqdm=True
    )  # fmt: skip


def finished(judge: Judge, run: Run) -> Labelled:
    """The model at the end of a run."""
    model = Labelled(DATA[judge.settings.data].network())
    model.network.load_state_dict(run.states[-1]["parameters"])
    return model


def judge_runs(name: str, seeds: list[int]) -> dict:
    judge = Judge.load(JUDGES[name])
    groups = judge.groups()
    truth, members, rows = judge.brute_force(groups), by_name(groups), Rows(judge.x, judge.labels)
    targets, true_sd = class_targets(judge), truth.with_losses.std(0).numpy()
    found, sigmas, covered, seconds = [], {}, {}, {}

    def add(seed: int, estimator: str, estimate: np.ndarray, slope: bool = False) -> None:
        row = {"seed": seed, "estimator": estimator, **agreement(estimate, truth)}
        found.append(row if slope else row | {"slope": None})

    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            run = single_run(judge, seed, f"{folder}/run", save="epoch", observation="propagated")
            seconds.setdefault("propagated, its training included", []).append(time.perf_counter() - begun)
            reports = {"propagated": run.report}
            reports["in_run"] = single_run(judge, seed, f"{folder}/in_run", observation="in_run").report
            begun = time.perf_counter()
            # A new model, into which the checkpoints' weights are loaded.
            reports["segments"] = attribute(
                Labelled(DATA[judge.settings.data].network()), rows, targets, checkpoints=f"{folder}/run", args=config(folder)
            )  # fmt: skip
            seconds.setdefault("segments", []).append(time.perf_counter() - begun)
            for estimator, report in reports.items():
                add(seed, estimator, grid(report.group(members, n_resamples=20), "mu", len(groups)), slope=True)
                sigmas.setdefault(estimator, []).append(np.array(list(report.sigma.values())) / true_sd)
                covered.setdefault(estimator, []).append(coverage(report, members, truth, 1.0))
            model = finished(judge, run)
            begun = time.perf_counter()
            report = attribute(model, rows, targets, args=config(folder))
            seconds.setdefault("finished", []).append(time.perf_counter() - begun)
            add(seed, "finished", grid(report.group(members, n_resamples=20), "mu", len(groups)))
            for estimator, (size, random) in INDICES.items():
                index = InfluenceIndex.build(
                    model,
                    rows,
                    f"{folder}/{estimator}",
                    projection=size,
                    random_projection=random,
                    args=config(folder),
                )
                scores = index.query(targets)
                add(seed, estimator, grid(scores.group(members, n_resamples=20), "mu", len(groups)))
            add(seed, "TracIn", group_scores(tracin(judge, run), groups))
            add(seed, "EK-FAC by kronfluence", group_scores(ekfac(judge, run, folder), groups))
        print(
            name,
            "seed",
            seed,
            json.dumps({row["estimator"]: round(row["disattenuated"], 3) for row in found if row["seed"] == seed}),
        )
    return {
        "reliability": truth.reliability,
        "groups": len(groups),
        "runs": judge.settings.runs,
        "rows": found,
        "summary": summarised(found),
        "sigma_within_1.3": {k: float((np.abs(np.log(v)) <= np.log(1.3)).mean()) for k, v in sigmas.items()},
        "sigma_ratio": {key: float(np.mean(values)) for key, values in sigmas.items()},
        "coverage": {key: float(np.mean(values)) for key, values in covered.items()},
        "seconds_in_trainings": {
            key: statistics.median(values) / statistics.median(seconds["propagated, its training included"])
            for key, values in seconds.items()
        },
    }


def index_cost(seed: int) -> dict:
    """What an index takes on disk and in time, of a training set that is repeated."""
    judge = Judge.load(JUDGES[NAMES[0]])
    rows = Rows(judge.x.repeat(REPEATED, 1), judge.labels.repeat(REPEATED))
    rounds, found = 5, {}
    with tempfile.TemporaryDirectory() as folder:
        model = finished(judge, single_run(judge, seed, f"{folder}/run", observation="in_run"))
        for estimator, (size, random) in INDICES.items():
            if random:
                continue
            begun = time.perf_counter()
            index = InfluenceIndex.build(model, rows, f"{folder}/{estimator}", projection=size, args=config(folder))
            build = time.perf_counter() - begun
            queries = torch.randn(QUERIES, index.manifest["width"], generator=torch.Generator().manual_seed(0))
            names = [str(one) for one in range(QUERIES)]
            times = {"plain": [], "faiss": []}
            for _ in range(rounds):
                begun = time.perf_counter()
                index._best(names, queries, 100)
                times["plain"].append(time.perf_counter() - begun)
                if (faiss := _faiss()) is not None:
                    begun = time.perf_counter()
                    flat = faiss.IndexFlatIP(index.manifest["width"])
                    for _, _, part in index.blocks():
                        flat.add(part.numpy())
                    flat.search(queries.numpy(), 100)
                    times["faiss"].append(time.perf_counter() - begun)
            found[estimator] = {
                "numbers": index.manifest["width"], "bytes_per_example": index.bytes_per_example, "build_seconds": build,
                **{key: statistics.median(values) for key, values in times.items() if values},
            }  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters())
    return {"examples": len(rows), "targets": QUERIES, "k": 100, "parameters": parameters, "rows": found}


def _faiss():
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(1)
    return faiss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, digits with SGD alone; writes nothing")
    quick = parser.parse_args().quick
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    if quick:
        print(json.dumps(judge_runs(NAMES[0], SEEDS[:1])["summary"], indent=1))
        return
    result = {
        "seeds": SEEDS,
        "judges": {name: judge_runs(name, SEEDS) for name in NAMES},
        "index": index_cost(SEEDS[0]),
    }
    (HERE / "results" / "influence_finished.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, judged in result["judges"].items():
        print(name, json.dumps({key: value for key, value in judged.items() if key != "rows"}, indent=1))
    print(json.dumps(result["index"], indent=1))


if __name__ == "__main__":
    main()
