"""Forgetting a class of a diffusion model: VDU's defaults beside the paper's objective, other bounded losses and other methods.

    python benchmarks/diffusion_unlearning.py [--quick] [--tune] [--table] [--curve] [--fashion [--retrained]]

Without a part's name all parts but `--fashion` run. Digits: a U-Net of 8 × 8 images; every method gets the same 200 steps, the
same batches of 32 forget images and, where it replays, the same samples of the original. The settings of every other method
(learning rate, weights) are chosen for it on another model and another class, by the distance that the table reports: the
lowest u-FID. Ours are the defaults. Pretraining is cached in ~/.cache/hf_unlearn (minutes a model). Results go to
benchmarks/results/diffusion_unlearning.json, tables to docs/benchmarks.md, curves and grids to docs/pictures/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from diffusers import DDPMPipeline
from generators import PICTURES, called, figures_of, grid_of, images_of, judge, judge_folder, run, start
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from hf_unlearn import VDUConfig, VDUTrainer
from hf_unlearn.examples.ddpm import DIGITS, FASHION_MNIST, Recipe, cached
from hf_unlearn.images import grid
from hf_unlearn.parameters.reference import trainable_parameters
from hf_unlearn.plots import curves
from hf_unlearn.unlearning.diffusion.drawing import generate
from hf_unlearn.unlearning.diffusion.encoded import EncodedImages


HERE = Path(__file__).parent
RESULTS = HERE / "results" / "diffusion_unlearning.json"
STEPS, DENOISING, OWN = 200, 25, 1000
TUNED_ON = (0, 1)  # seed and class: neither is in the table
SEEDS, CLASSES = (1, 2), (3, 6, 9)
SAME_AS_8 = ("ascent_variance_2", "ascent_variance_4")
MARKS = (25, 50, 100, 200, 400, 700, 1000, 2000)
CURVES = ("vdu", "npo_replay", "ascent_variance_8", "finetune")


# What is forgotten, and what is looked at


@dataclass(frozen=True)
class Task:
    """One kind of data: how its models are trained, and how many forget images are used."""

    recipe: Recipe
    forget_images: int | None


TASKS = {"digits": Task(DIGITS, None), "fashion_mnist": Task(FASHION_MNIST, 500)}


def forget_images(task: str, forgotten: int, seed: int) -> Tensor:
    images, labels = images_of(task, False)
    own = images[labels == forgotten]
    drawn = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))
    return own[drawn[: TASKS[task].forget_images]]


def original(task: str, seed: int, without: int | None = None) -> DDPMPipeline:
    recipe = replace(TASKS[task].recipe, seed=seed)
    return DDPMPipeline.from_pretrained(cached(recipe, without=without, progress=False))


def draw(pipeline: DDPMPipeline, count: int, seed: int) -> Tensor:
    return generate(pipeline, count, seed=seed, num_inference_steps=DENOISING, batch_size=250)


@cache
def own_samples(task: str, seed: int) -> EncodedImages:
    return EncodedImages(draw(original(task, seed), OWN, seed=100 + seed))


@cache
def classes_before(task: str, seed: int, count: int) -> Tensor:
    return judge(task).classify(draw(original(task, seed), count, seed=200 + seed))


def measured(pipeline: DDPMPipeline, task: str, seed: int, forgotten: int, count: int) -> dict[str, float]:
    """Figures of a model's samples, from the same noise as the original's."""
    images = draw(pipeline, count, seed=200 + seed)
    return figures_of(images, classes_before(task, seed, count), task, forgotten)


# The methods


class SalUnTrainer(VDUTrainer):
    """SalUn (arXiv 2310.12508) without labels: random targets on the forget images, the task's own loss on retained ones, in
    the half of the parameters on which the forget loss is steepest.
    """

    _method = "salun"

    def forget_loss(self, model, batch):
        generator = self._generator(self.state.global_step, 7)
        target = torch.randn(batch["noise"].shape, generator=generator)
        return self._error(self.predictions(model, batch)[0], target, batch)

    def train(self, **kwargs):
        self.mask = None
        return super().train(**kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.mask is None:
            self.mask = self._saliency()
        loss = super().training_step(model, inputs, num_items_in_batch)
        for name, parameter in trainable_parameters(self.model).items():
            parameter.grad.mul_(self.mask[name])
        return loss

    def _saliency(self) -> dict[str, Tensor]:
        parameters = trainable_parameters(self.model)
        totals = {name: torch.zeros_like(value) for name, value in parameters.items()}
        for batch in self._batches(self.forget_dataset, None):
            gradients = torch.autograd.grad(self.task_loss(self.model, batch).mean(), list(parameters.values()))
            for total, gradient in zip(totals.values(), gradients, strict=True):
                total += gradient
        middle = torch.cat([total.abs().flatten() for total in totals.values()]).median()
        return {name: (total.abs() >= middle).float() for name, total in totals.items()}


class FineTuner(VDUTrainer):
    """The task's own loss on retained data, nothing else: what was not repeated is forgotten, in time."""

    _method = "finetune"

    def forget_loss(self, model, batch):
        return torch.zeros(())


PLAIN = {"own_samples": 0, "replay_weight": 0.0, "guard": False, "loss_weighting": "simple"}
BOTH_SEEDS = ("original", "vdu", "npo_replay")  # the others run with the first, of which the summary is


def method(
    label: str,
    sees: str,
    settings: dict,
    tuned: dict | None = None,
    trainer: type[VDUTrainer] = VDUTrainer,
    **flags: bool,
) -> dict:
    return {"label": label, "sees": sees, "settings": settings, "tuned": tuned or {}, "trainer": trainer, **flags}


def anchored(label: str, count: int, **settings) -> dict:
    return method(
        f"ascent, {label}",
        "forget" + (f", {count} checkpoints" if count else ""),
        PLAIN | {"forget_loss": "ascent", "learning_rate": 1e-4, **settings},
        {"stability_weight": (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-1) if count else (1.0, 10.0, 30.0, 100.0, 1e4)},
        checkpoints=count,
    )


METHODS = {
    "vdu": method("**VDU, our defaults**", "forget", {}),
    "vdu_classifier": method("VDU, own samples sorted by a classifier", "forget, a classifier", {}, classifier=True),
    "vdu_rule": method("VDU, Bayes' rule itself (caution 1)", "forget", {"caution": 1.0}),
    "vdu_cautious": method("VDU, caution 10", "forget", {"caution": 10.0}),
    "vdu_no_replay": method("VDU, forget images only (no replay)", "forget", {"replay_weight": 0.0}),
    "vdu_simple": method("VDU, loss weighting as DDPM's, no guard", "forget", {"loss_weighting": "simple", "guard": False}),
    "npo_replay": method(
        "NPO with replay", "forget", {"forget_loss": "npo", "guard": False},
        {"learning_rate": (1e-4, 3e-4), "replay_weight": (1.0, 10.0)},
    ),
    "npo": method("NPO", "forget", PLAIN | {"forget_loss": "npo"}, {"learning_rate": (1e-6, 3e-6, 1e-5, 1e-4)}),
    "surrogate_replay": method(
        "Selective-Amnesia-style: noise as surrogate, Fisher, replay", "forget",
        {"forget_loss": "uniform", "guard": False, "loss_weighting": "simple", "stability": "fisher", "stability_weight": 10.0},
        {"learning_rate": (1e-4, 3e-4), "replay_weight": (1.0, 10.0)},
    ),
    "ascent": method("ascent", "forget", PLAIN | {"forget_loss": "ascent"}, {"learning_rate": (1e-6, 3e-6, 1e-5, 1e-4)}),
    "ascent_isotropic": anchored("isotropic anchor", 0, stability="isotropic"),
    "ascent_fisher": anchored("Fisher anchor", 0, stability="fisher"),
    "ascent_variance_2": anchored("inverse variance (the paper's term B)", 2, anchor="checkpoint_mean"),
    "ascent_variance_4": anchored("inverse variance (the paper's term B)", 4, anchor="checkpoint_mean"),
    "ascent_variance_8": anchored("inverse variance (the paper's term B)", 8, anchor="checkpoint_mean"),
    "salun": method(
        "SalUn-style: saliency, random target, retained data", "forget, retained", PLAIN | {"forget_weight": 0.1},
        {"learning_rate": (1e-4, 3e-4), "forget_weight": (0.01, 0.1)}, SalUnTrainer, retained=True,
    ),
    "finetune": method("fine-tuned on retained data", "retained", PLAIN, {"learning_rate": (1e-4, 3e-4, 1e-3)}, FineTuner, retained=True),
}  # fmt: skip


class Look(TrainerCallback):
    """Measures at the given steps."""

    def __init__(self, trainer: VDUTrainer, marks: tuple[int, ...], measure: Callable[[DDPMPipeline], dict]):
        self.trainer, self.marks, self.measure = trainer, marks, measure
        self.rows: list[dict] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.marks:
            self.rows.append({"step": state.global_step} | self.measure(self.trainer.pipeline))


def unlearned(
    task: str,
    name: str,
    seed: int,
    forgotten: int,
    chosen: dict,
    steps: int,
    marks: tuple[int, ...] = (),
    count: int = 500,
) -> tuple[VDUTrainer, list[dict], float]:
    """A run of one method."""
    spec = METHODS[name]
    images, labels = images_of(task, False)
    pipeline, folder = original(task, seed), cached(replace(TASKS[task].recipe, seed=seed))
    settings = spec["settings"] | chosen
    if spec.get("checkpoints"):
        every = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        settings["checkpoints"] = [str(path) for path in every[-spec["checkpoints"] :]]
    marks_forgotten = None
    if spec.get("classifier"):
        marks_forgotten = partial(called, task, forgotten)
    with tempfile.TemporaryDirectory() as scratch:
        args = VDUConfig(
            scratch,
            seed=seed,
            max_steps=steps,
            num_inference_steps=DENOISING,
            grid_images=0,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
            **settings,
        )
        trainer = spec["trainer"](
            pipeline=pipeline,
            args=args,
            forget_dataset=EncodedImages(forget_images(task, forgotten, seed)),
            retain_dataset=EncodedImages(images[labels != forgotten]) if spec.get("retained") else None,
            replay_dataset=own_samples(task, seed) if args.own_samples else None,
            marker=marks_forgotten,
        )
        trainer.pop_callback(PrinterCallback)
        look = Look(trainer, marks, partial(measured, task=task, seed=seed, forgotten=forgotten, count=count))
        trainer.add_callback(look)
        began = time.perf_counter()
        with suppress(FloatingPointError):  # the guard's word for a destroyed model
            trainer.train()
        return trainer, look.rows, time.perf_counter() - began


# The parts, each a list of jobs that two processes share


def tune_job(job: tuple) -> dict:
    name, option, steps, count = job
    seed, forgotten = TUNED_ON
    trainer, _, _ = unlearned("digits", name, seed, forgotten, option, steps)
    return {"method": name, "option": option} | measured(trainer.pipeline, "digits", seed, forgotten, count)


def table_job(job: tuple) -> dict:
    task, name, seed, forgotten, option, steps, count = job
    if name in ("original", "retrain"):
        model, seconds = original(task, seed, forgotten if name == "retrain" else None), 0.0
    else:
        trainer, _, seconds = unlearned(task, name, seed, forgotten, option, steps)
        model = trainer.pipeline
    figures = measured(model, task, seed, forgotten, count)
    return {"method": name, "seed": seed, "class": forgotten, "seconds": seconds} | figures


def curve_job(job: tuple) -> dict:
    name, seed, forgotten, option, marks, count = job
    _, rows, _ = unlearned("digits", name, seed, forgotten, option | {"guard": False}, marks[-1], marks, count)
    return {"method": name, "seed": seed, "class": forgotten, "rows": rows}


def summary(rows: list[dict]) -> dict:
    by_method: dict[str, list[dict]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    out = {}
    for name, own in by_method.items():
        out[name] = {
            key: statistics.mean(row[key] for row in own) for key in ("pul", "fid", "coverage", "shift", "seconds")
        }
        out[name] |= {
            "runs": len(own),
            "pul_worst": min(row["pul"] for row in own),
            "fid_worst": max(row["fid"] for row in own),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    for part in ("tune", "table", "curve"):
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--fashion", action="store_true")
    parser.add_argument(
        "--retrained", action="store_true", help="with --fashion: a model retrained without shirts beside it"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(METHODS), help="methods to tune and to measure again")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    parts = [part for part in ("tune", "table", "curve") if getattr(given, part)] or ["tune", "table", "curve"]
    seeds, classes, steps, count, marks, names = SEEDS, CLASSES, STEPS, 1000, MARKS, list(METHODS)
    if given.quick:
        seeds, classes, steps, count, marks, names = (0,), (3,), 4, 150, (2, 4), ["vdu", "ascent_variance_2", "salun"]
    start()
    if given.fashion:
        return fashion(given.workers, given.retrained)
    for seed in {TUNED_ON[0], *seeds}:  # before the processes would train the same model twice
        original("digits", seed)
        for forgotten in classes if seed == seeds[0] and not given.quick else ():
            original("digits", seed, forgotten)
    for seed in (0, 1):
        judge_folder("digits", seed)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and not given.quick else {}
    if "tune" in parts:
        jobs = [(name, option, steps, min(count, 300)) for name in names if METHODS[name]["tuned"] and name not in SAME_AS_8 and name in (given.only or names)
                for option in grid_of(METHODS[name]["tuned"])[: 2 if given.quick else None]]  # fmt: skip
        tried = run(tune_job, jobs, given.workers)
        if given.only:
            tried += [row for row in results["tuning"]["tried"] if row["method"] not in given.only]
        results["tuning"] = {"seed": TUNED_ON[0], "class": TUNED_ON[1], "tried": tried}
        results["chosen"] = {
            name: min((row for row in tried if row["method"] == name), key=lambda row: row["fid"])["option"]
            for name in {row["method"] for row in tried}
        }
        for name in SAME_AS_8:  # the weight of B does not depend on how many checkpoints there are
            results["chosen"][name] = results["chosen"].get("ascent_variance_8", {})
        save(results, given.quick)
    chosen = results.get("chosen", {})
    if "table" in parts:
        every = given.only or ["original", *([] if given.quick else ["retrain"]), *names]
        jobs = [
            ("digits", name, seed, forgotten, chosen.get(name, {}), steps, count)
            for name in every
            for seed in (seeds if name in BOTH_SEEDS else seeds[:1])
            for forgotten in classes
        ]
        rows = run(table_job, jobs, given.workers)
        if given.only:
            rows += [row for row in results["runs"] if row["method"] not in given.only]
            rows.sort(key=lambda row: ["original", "retrain", *METHODS].index(row["method"]))
        results |= {
            "seeds": seeds,
            "classes": classes,
            "steps": steps,
            "samples": count,
            "runs": rows,
            "summary": summary([row for row in rows if row["seed"] == seeds[0]]),
        }
        results["labels"] = {name: [spec["label"], spec["sees"]] for name, spec in METHODS.items()}
        save(results, given.quick)
        if not given.quick and "vdu" in (given.only or names):
            pictures(seeds[0], classes[0], steps)
    if "curve" in parts:
        jobs = [(name, seeds[0], forgotten, chosen.get(name, {}), marks, min(count, 500))
                for name in (CURVES if not given.quick else ("vdu",))
                for forgotten in classes[: 2 if name == "vdu" else 1]]  # fmt: skip
        results["curve"] = run(curve_job, jobs, given.workers)
        save(results, given.quick)
    print(json.dumps(results.get("summary", {}), indent=1))
    if "curve" in parts and not given.quick:
        draw_curves(results)


def save(results: dict, quick: bool) -> None:
    if not quick:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def fashion(workers: int, retrained: bool) -> None:
    """Confirmation: trousers, and shirts, which are easily taken for T-shirts, pullovers and coats."""
    classes, seed, count = (1, 6), 0, 500
    original("fashion_mnist", seed)
    if retrained:
        original("fashion_mnist", seed, 6)
    judge_folder("fashion_mnist", 0)
    jobs = [
        ("fashion_mnist", name, seed, forgotten, {}, STEPS, count)
        for forgotten in classes
        for name in ("original", "vdu")
    ]
    if retrained:
        jobs.append(("fashion_mnist", "retrain", seed, 6, {}, STEPS, count))
    rows = run(table_job, jobs, workers)
    results = json.loads(RESULTS.read_text())
    results["fashion_mnist"] = {"runs": rows, "samples": count, "images": TASKS["fashion_mnist"].forget_images}
    save(results, quick=False)


def pictures(seed: int, forgotten: int, steps: int) -> None:
    """Grids from the same noise: the original, unlearned and retrained."""
    trainer, _, _ = unlearned("digits", "vdu", seed, forgotten, {}, steps)
    models = {
        "original": original("digits", seed),
        "unlearned": trainer.pipeline,
        "retrained": original("digits", seed, forgotten),
    }
    for name, model in models.items():
        grid(draw(model, 64, seed=200 + seed), columns=16).save(PICTURES / f"diffusion_digits_{name}.png")


def draw_curves(results: dict) -> None:
    for key, label in (("pul", "PUL, %"), ("fid", "u-FID")):
        series = {}
        for name in CURVES:
            runs = [run["rows"] for run in results["curve"] if run["method"] == name]
            steps = [row["step"] for row in runs[0]]
            label_of = METHODS[name]["label"].strip("*")
            series[label_of] = (steps, [statistics.mean(rows[i][key] for rows in runs) for i in range(len(steps))])
        if key == "fid":  # the destroyed ones would hide the others
            series = {name: (x, [min(value, 40) for value in y]) for name, (x, y) in series.items()}
        levels = {name: results["summary"][name][key] for name in ("retrain",)}
        curves(
            series,
            PICTURES / f"diffusion_unlearning_{key}.png",
            x_label="steps",
            y_label=label,
            log_x=True,
            levels=levels,
        )


if __name__ == "__main__":
    main()
