"""Forgetting a class of a GAN from feedback on its samples: ours beside the paper's objectives and simpler ones.

    python benchmarks/gan_unlearning.py [--quick] [--tune] [--table] [--sensitivity] [--fashion [--retrained]]

Without a part's name all parts but `--fashion` run. A classifier plays the user: it looks at samples of the original, one after
another, until it has seen 20 or 100 of the undesired class; all others that it has seen are the positive marks. No method gets
training data. Every method gets the same steps and batches; the settings of every method but ours are chosen for it on another
model and other classes, with a fair grid: the highest PUL where the Fréchet distance stays within 1.5 × the original's, else the
smallest distance. Pretraining is cached in ~/.cache/hf_unlearn (minutes a model). Results go to
benchmarks/results/gan_unlearning.json, tables to docs/benchmarks.md, curves and grids to docs/pictures/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from generators import (
    PICTURES,
    called,
    figures_of,
    grid_of,
    judge,
    judge_folder,
    reference,
    run,
    start,
)
from torch import Tensor
from transformers.trainer_callback import PrinterCallback

from hf_unlearn import AdaptThenUnlearnConfig, AdaptThenUnlearnTrainer, GANPipeline
from hf_unlearn.examples.gan import DIGITS, FASHION_MNIST, cached
from hf_unlearn.images import grid
from hf_unlearn.metrics.features import Features, features_of
from hf_unlearn.metrics.generation import frechet_distance
from hf_unlearn.plots import curves
from hf_unlearn.unlearning.gan.adapt_then_unlearn import REPULSION_RATES, REPULSION_WEIGHTS


HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gan_unlearning.json"
RECIPES = {"digits": DIGITS, "fashion_mnist": FASHION_MNIST}
SAMPLES, RETRAINED_SAMPLES = 2_000, 5_000
TUNED_ON = ((0, 0), (0, 8))  # seed and class: neither is in the table
SEEDS, CLASSES, MARKS = (1, 2), (3, 6, 9), (20, 100)
BAR = 1.5  # times the original's distance


# What is forgotten, and what is looked at


def model(task: str, seed: int, without: int | None = None) -> GANPipeline:
    recipe = replace(RECIPES[task], seed=seed)
    return GANPipeline.from_pretrained(cached(recipe, without=without, progress=False))


def latents(count: int, seed: int, length: int = 64) -> Tensor:
    return torch.randn(count, length, generator=torch.Generator().manual_seed(seed))


@cache
def feedback(task: str, seed: int, forgotten: int, marks: int) -> tuple[Tensor, Tensor]:
    """Images that a user marks, negative and positive, who stops after so many undesired."""
    seen = model(task, seed).draw(latents(20_000, 300 + seed))
    negative = called(task, forgotten, seen)
    end = int(negative.nonzero()[marks - 1]) + 1
    return seen[:end][negative[:end]], seen[:end][~negative[:end]]


@cache
def classes_before(task: str, seed: int, count: int) -> Tensor:
    return judge(task).classify(model(task, seed).draw(latents(count, 200 + seed)))


@cache
def retrained_features(task: str, seed: int, forgotten: int) -> Features:
    return features_of(model(task, seed, forgotten).draw(latents(RETRAINED_SAMPLES, 400 + seed)), judge(task))


def measured(
    pipeline: GANPipeline, task: str, seed: int, forgotten: int, count: int, ret_fid: bool
) -> dict[str, float]:
    """Figures of a model's samples, from the same latents as the original's."""
    images = pipeline.draw(latents(count, 200 + seed))
    figures = figures_of(images, classes_before(task, seed, count), task, forgotten)
    if ret_fid:
        drawn = features_of(images.nan_to_num(), judge(task))
        figures["ret_fid"] = frechet_distance(retrained_features(task, seed, forgotten), drawn).distance
    return figures


def distance_of_original(task: str, seed: int, count: int) -> float:
    """To all real images, the undesired class among them: what the GAN is worth before."""
    images = model(task, seed).draw(latents(count, 200 + seed))
    return frechet_distance(reference(task, None), features_of(images, judge(task))).distance


# The methods


class Consolidated(AdaptThenUnlearnTrainer):
    """Elastic weight consolidation around the original instead of repulsion."""

    def train(self, **kwargs):
        self._remember_original(False)
        self.anchor = self.build_consolidation()
        return super().train(**kwargs)


# The paper's data: the marked samples and nothing else.
MARKED = {"negative_share": 0.0, "own_samples": 0}
RATES = (5e-4, 2e-3)


def method(label: str, settings: dict, tuned: dict | list | None = None, **flags) -> dict:
    options = tuned if isinstance(tuned, list) else grid_of(tuned or {})
    return {"label": label, "settings": settings, "options": options, "trainer": AdaptThenUnlearnTrainer, **flags}


METHODS = {
    "ours": method("**ours, the defaults**", {}),
    "ours_no_repulsion": method("ours, no repulsion", {"repulsion": "none"}, first_seed=True),
    "ours_no_false": method("ours, undesired not shown as drawn", {"negative_share": 0.0}, first_seed=True),
    "ours_no_spread": method("ours, marks not spread", {"own_samples": 0}, first_seed=True),
    "el2": method("EL2, marks alone", MARKED, {"learning_rate": RATES, "repulsion_weight": (0.3, 3.0, 30.0)}),
    "nl2": method("NL2, marks alone", MARKED | {"repulsion": "nl2"}, {"learning_rate": RATES, "repulsion_weight": (3e-4, 1e-3, 1e-2)}, first_seed=True),
    "il2": method("IL2, marks alone", MARKED | {"repulsion": "il2"}, {"learning_rate": RATES, "repulsion_weight": (0.1, 1.0)}, first_seed=True),
    "consolidation": method(
        "consolidation only", MARKED | {"repulsion": "none"}, {"learning_rate": RATES, "consolidation_weight": (1e-3, 1e-2, 1e-1)},
        trainer=Consolidated, first_seed=True,
    ),
    "finetune": method("fine-tuned on clean", MARKED | {"repulsion": "none"}, {"learning_rate": (2e-4, *RATES)}),
    "extrapolation": method("extrapolation", MARKED, {"scale": (-0.2, -0.5, -1.0, -2.0, -4.0)}, first_seed=True),
}  # fmt: skip


def unlearned(
    task: str, name: str, seed: int, forgotten: int, marks: int, option: dict, steps: int | None
) -> tuple[GANPipeline, float]:
    """A run of one method, and the seconds it took."""
    spec = METHODS[name]
    settings = spec["settings"] | option
    scale = settings.pop("scale", None)
    undesired, clean = feedback(task, seed, forgotten, marks)
    with tempfile.TemporaryDirectory() as scratch:
        args = AdaptThenUnlearnConfig(
            scratch,
            seed=seed,
            grid_images=0,
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
            **({} if steps is None else {"max_steps": steps, "adapt_steps": min(steps, 300)}),
            **settings,
        )
        began = time.perf_counter()
        trainer = spec["trainer"](model(task, seed), args, undesired=undesired, clean=clean)
        trainer.pop_callback(PrinterCallback)
        if args.repulsion != "none":
            began -= adapt(trainer, (task, seed, forgotten, marks, args.adapt_steps))
        if scale is not None:
            return trainer.extrapolated(scale), time.perf_counter() - began
        trainer.train()
        return trainer.pipeline, time.perf_counter() - began


ADAPTED: dict[tuple, tuple[list, float]] = {}


def adapt(trainer: AdaptThenUnlearnTrainer, key: tuple) -> float:
    """Stage 1, once for all methods that share it; seconds to add where it was not done now."""
    if key in ADAPTED:
        trainer._remember_original(False)
        trainer.adapted, seconds = ADAPTED[key]
        return seconds
    began = time.perf_counter()
    ADAPTED[key] = trainer.adapt(), time.perf_counter() - began
    return 0.0


# The parts, each a list of jobs that two processes share


def tune_job(job: tuple) -> dict:
    """A method's options on one model, one after another, so that stage 1 is done once."""
    pairs, seed, forgotten, marks, steps, count = job
    limit = BAR * distance_of_original("digits", seed, count)
    rows = []
    for name, option in pairs:
        pipeline, _ = unlearned("digits", name, seed, forgotten, marks, option, steps)
        figures = measured(pipeline, "digits", seed, forgotten, count, ret_fid=False)
        rows.append({"method": name, "class": forgotten, "marks": marks, "option": option, "limit": limit} | figures)
        print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows}


def best(tried: list[dict]) -> dict:
    """The option with the highest PUL within the bar on average over the classes, else with the smallest distance."""
    options: dict[str, list[dict]] = {}
    for row in tried:
        options.setdefault(json.dumps(row["option"]), []).append(row)
    means = [
        {key: statistics.mean(row[key] for row in rows) for key in ("pul", "fid", "limit")}
        | {"option": rows[0]["option"]}
        for rows in options.values()
    ]
    within = [row for row in means if row["fid"] <= row["limit"]]
    chosen = max(within, key=lambda row: row["pul"]) if within else min(means, key=lambda row: row["fid"])
    return chosen["option"]


def table_job(job: tuple) -> dict:
    task, name, seed, forgotten, marks, option, steps, count, ret_fid = job
    if name in ("original", "retrain"):
        pipeline, seconds = model(task, seed, forgotten if name == "retrain" else None), 0.0
    else:
        pipeline, seconds = unlearned(task, name, seed, forgotten, marks, option, steps)
    figures = measured(pipeline, task, seed, forgotten, count, ret_fid)
    return {"method": name, "seed": seed, "class": forgotten, "marks": marks, "seconds": seconds} | figures


def sensitivity_job(job: tuple) -> dict:
    what, value, seed, forgotten, marks, settings, steps, count = job
    pipeline, _ = unlearned("digits", "ours", seed, forgotten, marks, settings, steps)
    figures = measured(pipeline, "digits", seed, forgotten, count, ret_fid=False)
    return {"what": what, "value": value, "class": forgotten, "marks": marks} | figures


SWEEPS = {  # one setting at a time, the others at their defaults and 20 marks
    "marks": (20, (5, 10, 50, 100, 200)),
    "repulsion_weight": (REPULSION_WEIGHTS["relative"]["el2"], (0.01, 1.0)),
    "repulsion_rate": (REPULSION_RATES["relative"], (0.1, 10.0)),
    "negative_share": (AdaptThenUnlearnConfig.negative_share, (0.0, 0.1, 0.4)),
    "max_steps": (AdaptThenUnlearnConfig.max_steps, (300, 3000)),
}


def sensitivity_jobs(steps: int | None, count: int) -> list[tuple]:
    """The runs of all sweeps, on the models that the defaults were chosen on; that of the defaults is in all of them."""
    runs = [("defaults", 0, 20, {})]
    runs += [("marks", marks, marks, {}) for marks in SWEEPS["marks"][1]]
    for what in list(SWEEPS)[1:]:
        runs += [(what, value, 20, {what: value}) for value in SWEEPS[what][1]]
    return [
        (what, value, *where, marks, settings, None if what == "max_steps" else steps, count)
        for what, value, marks, settings in runs
        for where in TUNED_ON
    ]


def with_defaults(rows: list[dict]) -> list[dict]:
    """Sorted sweeps, each with the run of the defaults in its place."""
    out = [
        row | {"what": what, "value": middle if row["what"] == "defaults" else row["value"]}
        for what, (middle, _) in SWEEPS.items()
        for row in rows
        if row["what"] in ("defaults", what)
    ]
    return sorted(out, key=lambda row: (list(SWEEPS).index(row["what"]), row["value"], row["class"]))


def summary(rows: list[dict], originals: dict[int, float]) -> dict:
    """Means and worst cases by method and number of marks."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(f"{row['method']} {row['marks'] or ''}".strip(), []).append(row)
    out = {}
    for name, own in groups.items():
        keys = [key for key in ("pul", "fid", "ret_fid", "coverage", "shift", "seconds") if key in own[0]]
        out[name] = {key: statistics.mean(row[key] for row in own) for key in keys} | {
            "runs": len(own),
            "pul_worst": min(row["pul"] for row in own),
            "fid_worst": max(row["fid"] for row in own),
            "fid_ratio": statistics.mean(row["fid"] / originals[row["seed"]] for row in own),
            "fid_ratio_worst": max(row["fid"] / originals[row["seed"]] for row in own),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for part in ("tune", "table", "sensitivity"):
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--fashion", action="store_true")
    parser.add_argument(
        "--retrained", action="store_true", help="with --fashion: a GAN retrained without trousers beside it"
    )
    parser.add_argument("--quick", action="store_true", help="few steps; writes nothing")
    parser.add_argument("--again", action="store_true", help="tune from scratch, forgetting what has been tried")
    parser.add_argument("--only", nargs="+", choices=list(METHODS), help="methods to measure again")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    parts = [part for part in ("tune", "table", "sensitivity") if getattr(given, part)]
    parts = parts or ["tune", "table", "sensitivity"]
    start()
    if given.fashion:
        return fashion(given.workers, given.retrained)
    names, quick = list(METHODS), given.quick
    seeds, classes, marks, count, steps, most = SEEDS, CLASSES, MARKS, SAMPLES, None, None
    tuned_on = TUNED_ON
    if quick:
        seeds, classes, marks, count, steps, most, tuned_on = (0,), (3,), (20,), 200, 4, 1, TUNED_ON[:1]
        names = ["ours", "el2", "consolidation", "extrapolation"]
    for seed in (0, 1):
        judge_folder("digits", seed)
    for seed in {TUNED_ON[0][0], *seeds}:  # before the processes would train the same model twice
        model("digits", seed)
        for forgotten in classes if seed in seeds and not quick else ():
            model("digits", seed, forgotten)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and not quick else {}
    if "tune" in parts:
        pairs = [
            (name, option)
            for name in names
            for option in METHODS[name]["options"][:most]
            if METHODS[name]["options"][1:]
        ]
        tried = [
            row
            for row in results.get("tuning", {}).get("tried", [])
            if not given.again and (row["method"], row["option"]) in pairs
        ]
        known = [(row["method"], row["option"], row["class"], row["marks"]) for row in tried]
        jobs = [
            (
                [(name, option) for name, option in pairs if (name, option, where[1], number) not in known],
                *where,
                number,
                steps,
                count,
            )
            for where in tuned_on
            for number in marks
        ]
        tried += [row for done in run(tune_job, jobs, given.workers) for row in done["rows"]]
        results["tuning"] = {"on": tuned_on, "tried": tried}
        results["chosen"] = {
            name: {
                str(number): best([row for row in tried if (row["method"], row["marks"]) == (name, number)])
                for number in marks
            }
            for name in dict.fromkeys(row["method"] for row in tried)
        }
        save(results, quick)
    if "table" in parts:
        chosen = results.get("chosen", {})
        jobs = []
        for seed in seeds:
            for forgotten in classes:
                if not given.only or quick:
                    jobs += [
                        ("digits", name, seed, forgotten, 0, {}, steps, count, not quick)
                        for name in ("original", "retrain")[: 1 if quick else 2]
                    ]
                jobs += [
                    (
                        "digits",
                        name,
                        seed,
                        forgotten,
                        number,
                        chosen.get(name, {}).get(str(number), {}),
                        steps,
                        count,
                        not quick,
                    )
                    for number in marks
                    for name in (given.only or names)
                    if seed == seeds[0] or not METHODS[name].get("first_seed")
                ]
        rows = run(table_job, jobs, given.workers)
        if given.only:
            rows += [row for row in results["runs"] if row["method"] not in given.only]
            rows.sort(key=lambda row: (["original", "retrain", *METHODS].index(row["method"]), row["marks"]))
        originals = {seed: distance_of_original("digits", seed, count) for seed in seeds}
        results |= {"seeds": seeds, "classes": classes, "samples": count, "runs": rows, "originals": originals}
        results["summary"] = summary([row for row in rows if row["seed"] == seeds[0]], originals)
        results["labels"] = {name: spec["label"] for name, spec in METHODS.items()}
        save(results, quick)
        if not quick and "ours" in names:
            pictures(seeds[0], classes[0], marks[0])
    if "sensitivity" in parts:
        jobs = sensitivity_jobs(steps, count)[: 2 if quick else None]
        results["sensitivity"] = with_defaults(run(sensitivity_job, jobs, given.workers))
        results["sensitivity_limit"] = BAR * distance_of_original("digits", TUNED_ON[0][0], count)
        save(results, quick)
        if not quick:
            draw_sensitivity(results["sensitivity"])
    print(json.dumps(results.get("summary", {}), indent=1))


def save(results: dict, quick: bool) -> None:
    if not quick:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def fashion(workers: int, retrained: bool) -> None:
    """Confirmation: trousers, by the two best methods."""
    task, seed, forgotten, marks = "fashion_mnist", 0, 1, 100
    for number in (0, 1):
        judge_folder(task, number)
    results = json.loads(RESULTS.read_text())
    for without in (None, forgotten) if retrained else (None,):
        model(task, seed, without)
    chosen = results["chosen"]
    jobs = [
        (task, name, seed, forgotten, marks, chosen.get(name, {}).get(str(marks), {}), None, SAMPLES, retrained)
        for name in ("original", *(["retrain"] if retrained else []), "ours", "finetune")
    ]
    rows = run(table_job, jobs, workers)
    results["fashion_mnist"] = {"runs": rows, "marks": marks, "original": distance_of_original(task, seed, SAMPLES)}
    save(results, quick=False)
    for name, pipeline in (
        ("original", model(task, seed)),
        ("unlearned", unlearned(task, "ours", seed, forgotten, marks, {}, None)[0]),
    ):
        grid(pipeline.draw(latents(64, 200 + seed)), columns=16).save(PICTURES / f"gan_fashion_mnist_{name}.png")


def pictures(seed: int, forgotten: int, marks: int) -> None:
    """Grids from the same latents: the original, unlearned and retrained."""
    models = {
        "original": model("digits", seed),
        "unlearned": unlearned("digits", "ours", seed, forgotten, marks, {}, None)[0],
        "retrained": model("digits", seed, forgotten),
    }
    for name, pipeline in models.items():
        grid(pipeline.draw(latents(64, 200 + seed)), columns=16).save(PICTURES / f"gan_digits_{name}.png")


def draw_sensitivity(rows: list[dict]) -> None:
    for what in ("marks", "repulsion_weight"):
        for key, label in (("pul", "PUL, %"), ("fid", "FID")):
            series = {}
            for _, forgotten in TUNED_ON:
                own = [row for row in rows if row["what"] == what and row["class"] == forgotten]
                series[f"class {forgotten}"] = ([row["value"] for row in own], [row[key] for row in own])
            file = PICTURES / f"gan_{what}_{key}.png"
            curves(series, file, x_label=what.replace("_", " "), y_label=label, log_x=True)


if __name__ == "__main__":
    main()
