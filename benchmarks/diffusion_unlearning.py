"""Forgetting a class of a diffusion model: VDU's defaults beside the paper's objective, other bounded losses and other methods.

    python benchmarks/diffusion_unlearning.py [--quick] [--fashion] [--tune] [--curve] [--table]

Without a part's name all parts run but `--fashion`. Digits: a U-Net of 8 × 8 images; every method gets the same 200 steps, the
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
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch
from diffusers import DDPMPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers import AutoModelForImageClassification, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from hf_unlearn import VDUConfig, VDUTrainer
from hf_unlearn.data import load
from hf_unlearn.demo import cached_digits_classifier
from hf_unlearn.diffusion import EncodedImages, generate
from hf_unlearn.metrics.features import ClassifierFeatures, Features, features_of
from hf_unlearn.metrics.generation import class_shift, density_coverage, frechet_distance, percentage_unlearned
from hf_unlearn.parameters import trainable_parameters
from hf_unlearn.plots import curves
from hf_unlearn.small_ddpm import DIGITS, cached, grey_images
from hf_unlearn.unlearning.samples import grid


HERE = Path(__file__).parent
RESULTS = HERE / "results" / "diffusion_unlearning.json"
STEPS, DENOISING, OWN = 200, 25, 1000
TUNED_ON = (0, 1)  # seed and class: neither is in the table
SEEDS, CLASSES = (1, 2), (3, 6, 9)
MARKS = (25, 50, 100, 200, 400, 700, 1000, 2000)
CURVES = ("vdu", "npo_replay", "ascent_variance_8", "finetune")


# What is forgotten, and what is looked at


@cache
def real(dataset: str, size: int) -> tuple[Tensor, Tensor]:
    """All real images and their labels."""
    splits = load(dataset)
    images = torch.cat([grey_images(rows, size) for rows in splits.values()])
    return images, torch.tensor([label for rows in splits.values() for label in rows["label"]])


@cache
def train_images(dataset: str, size: int) -> tuple[Tensor, Tensor]:
    rows = load(dataset)["train"]
    return grey_images(rows, size), torch.tensor(rows["label"])


@cache
def judge(seed: int = 0) -> ClassifierFeatures:
    """A classifier of all ten digits. That of seed 0 measures, and no method sees it."""
    model = AutoModelForImageClassification.from_pretrained(cached_digits_classifier(seed))
    return ClassifierFeatures(model.eval(), name=f"digits-resnet-{seed}")


@cache
def reference(forgotten: int) -> Features:
    images, labels = real(DIGITS.dataset, DIGITS.size)
    return features_of(images[labels != forgotten], judge())


def original(seed: int, without: int | None = None) -> DDPMPipeline:
    return DDPMPipeline.from_pretrained(cached(replace(DIGITS, seed=seed), without=without, progress=False))


def draw(pipeline: DDPMPipeline, count: int, seed: int) -> Tensor:
    return generate(pipeline, count, seed=seed, num_inference_steps=DENOISING, batch_size=250)


@cache
def own_samples(seed: int) -> EncodedImages:
    return EncodedImages(draw(original(seed), OWN, seed=100 + seed))


@cache
def drawn_before(seed: int, count: int) -> tuple[Tensor, Tensor]:
    images = draw(original(seed), count, seed=200 + seed)
    return images, judge().classify(images)


def measured(pipeline: DDPMPipeline, seed: int, forgotten: int, count: int) -> dict[str, float]:
    """Figures of a model's samples, from the same noise as the original's."""
    images = draw(pipeline, count, seed=200 + seed).nan_to_num()  # of a destroyed model
    before, after = drawn_before(seed, count)[1], judge().classify(images)
    fake = features_of(images, judge())
    unlearned = percentage_unlearned(before, after, forgotten)
    return {
        "pul": unlearned.pul,
        "fid": frechet_distance(reference(forgotten), fake).distance,
        "coverage": density_coverage(reference(forgotten), fake).coverage,
        "shift": 100 * class_shift(before, after, forgotten, 10).total_variation,
        "left": unlearned.n_after,
        "before": unlearned.n_before,
    }


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


PLAIN = {"replay_samples": 0, "replay_weight": 0.0, "guard": False, "loss_weighting": "simple"}
RATES = (1e-5, 1e-4, 3e-4)


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
        PLAIN | {"forget_loss": "ascent", "max_grad_norm": 1.0, **settings},
        {"learning_rate": (1e-5, 1e-4), "stability_weight": (1e-4, 1e-2, 1.0) if count else (1.0, 100.0, 1e4)},
        checkpoints=count,
    )


METHODS = {
    "vdu": method("**VDU, our defaults**", "forget", {}),
    "vdu_classifier": method("VDU, own samples sorted by a classifier", "forget, a classifier", {}, classifier=True),
    "vdu_rule": method("VDU, Bayes' rule itself (caution 1)", "forget", {"caution": 1.0}),
    "vdu_no_replay": method("VDU, forget images only (no replay)", "forget", {"replay_weight": 0.0}),
    "vdu_simple": method("VDU, loss weighting as DDPM's", "forget", {"loss_weighting": "simple"}),
    "npo_replay": method(
        "NPO with replay", "forget", {"forget_loss": "npo", "guard": False},
        {"learning_rate": RATES, "replay_weight": (1.0, 10.0)},
    ),
    "npo": method("NPO", "forget", PLAIN | {"forget_loss": "npo"}, {"learning_rate": (1e-6, *RATES)}),
    "surrogate_replay": method(
        "Selective-Amnesia-style: noise as surrogate, Fisher, replay", "forget",
        {"forget_loss": "uniform", "guard": False, "loss_weighting": "simple", "stability": "fisher", "stability_weight": 10.0},
        {"learning_rate": RATES, "replay_weight": (1.0, 10.0)},
    ),
    "ascent": method("ascent", "forget", PLAIN | {"forget_loss": "ascent"}, {"learning_rate": (1e-6, *RATES)}),
    "ascent_isotropic": anchored("isotropic anchor", 0, stability="isotropic"),
    "ascent_fisher": anchored("Fisher anchor", 0, stability="fisher"),
    "ascent_variance_2": anchored("inverse variance (the paper's term B)", 2, anchor="checkpoint_mean"),
    "ascent_variance_4": anchored("inverse variance (the paper's term B)", 4, anchor="checkpoint_mean"),
    "ascent_variance_8": anchored("inverse variance (the paper's term B)", 8, anchor="checkpoint_mean"),
    "salun": method(
        "SalUn-style: saliency, random target, retained data", "forget, retained", PLAIN | {"forget_weight": 0.1},
        {"learning_rate": RATES, "forget_weight": (0.01, 0.1)}, SalUnTrainer, retained=True,
    ),
    "finetune": method("fine-tuned on retained data", "retained", PLAIN, {"learning_rate": (*RATES, 1e-3)}, FineTuner, retained=True),
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
    name: str, seed: int, forgotten: int, chosen: dict, steps: int, marks: tuple[int, ...] = (), count: int = 500
) -> tuple[VDUTrainer, list[dict], float]:
    """A run of one method."""
    spec = METHODS[name]
    images, labels = train_images(DIGITS.dataset, DIGITS.size)
    pipeline, folder = original(seed), cached(replace(DIGITS, seed=seed))
    settings = spec["settings"] | chosen
    if spec.get("checkpoints"):
        every = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        settings["checkpoints"] = [str(path) for path in every[-spec["checkpoints"] :]]
    marks_forgotten = None
    if spec.get("classifier"):
        marks_forgotten = partial(called, forgotten)
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
            forget_dataset=EncodedImages(images[labels == forgotten]),
            retain_dataset=EncodedImages(images[labels != forgotten]) if spec.get("retained") else None,
            replay_dataset=own_samples(seed) if args.replay_samples else None,
            replay_filter=marks_forgotten,
        )
        trainer.pop_callback(PrinterCallback)
        look = Look(trainer, marks, partial(measured, seed=seed, forgotten=forgotten, count=count))
        trainer.add_callback(look)
        began = time.perf_counter()
        with suppress(FloatingPointError):  # the guard's word for a destroyed model
            trainer.train()
        return trainer, look.rows, time.perf_counter() - began


def called(forgotten: int, images: Tensor) -> Tensor:
    """The filter of a user who has a classifier: of another seed than the judge's."""
    return judge(1).classify(images) == forgotten


# The parts, each a list of jobs that two processes share


def start() -> None:
    torch.set_num_threads(1)
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()


def grid_of(tuned: dict) -> list[dict]:
    options = [{}]
    for key, values in tuned.items():
        options = [option | {key: value} for option in options for value in values]
    return options


def tune_job(job: tuple) -> dict:
    name, option, steps, count = job
    seed, forgotten = TUNED_ON
    trainer, _, _ = unlearned(name, seed, forgotten, option, steps)
    return {"method": name, "option": option} | measured(trainer.pipeline, seed, forgotten, count)


def table_job(job: tuple) -> dict:
    name, seed, forgotten, option, steps, count = job
    if name in ("original", "retrain"):
        model, seconds = original(seed, forgotten if name == "retrain" else None), 0.0
    else:
        trainer, _, seconds = unlearned(name, seed, forgotten, option, steps)
        model = trainer.pipeline
    return {"method": name, "seed": seed, "class": forgotten, "seconds": seconds} | measured(
        model, seed, forgotten, count
    )


def curve_job(job: tuple) -> dict:
    name, seed, forgotten, option, marks, count = job
    _, rows, _ = unlearned(name, seed, forgotten, option | {"guard": False}, marks[-1], marks, count)
    return {"method": name, "seed": seed, "class": forgotten, "rows": rows}


def run(function: Callable, jobs: list, workers: int) -> list[dict]:
    done = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start) as pool:
        for row in pool.map(function, jobs):
            shown = {
                key: round(value, 2) if isinstance(value, float) else value
                for key, value in row.items()
                if key != "rows"
            }
            print(json.dumps(shown), flush=True)
            done.append(row)
    return done


def summary(rows: list[dict]) -> dict:
    by_method: dict[str, list[dict]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    out = {}
    for name, own in by_method.items():
        out[name] = {
            key: statistics.mean(row[key] for row in own) for key in ("pul", "fid", "coverage", "shift", "seconds")
        }
        out[name] |= {"pul_worst": min(row["pul"] for row in own), "fid_worst": max(row["fid"] for row in own)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    for part in ("tune", "table", "curve"):
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    parts = [part for part in ("tune", "table", "curve") if getattr(given, part)] or ["tune", "table", "curve"]
    seeds, classes, steps, count, marks, names = SEEDS, CLASSES, STEPS, 1000, MARKS, list(METHODS)
    if given.quick:
        global DIGITS, OWN, TUNED_ON
        seeds, classes, steps, count, marks, names = (0,), (3,), 4, 60, (2, 4), ["vdu", "ascent_variance_2", "salun"]
    start()
    for seed in {TUNED_ON[0], *seeds}:  # before the processes would train the same model twice
        original(seed)
        for forgotten in classes if seed in seeds and not given.quick else ():
            original(seed, forgotten)
    for seed in (0, 1):
        cached_digits_classifier(seed)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and not given.quick else {}
    if "tune" in parts:
        jobs = [(name, option, steps, min(count, 500)) for name in names if METHODS[name]["tuned"]
                for option in grid_of(METHODS[name]["tuned"])[: 2 if given.quick else None]]  # fmt: skip
        tried = run(tune_job, jobs, given.workers)
        results["tuning"] = {"seed": TUNED_ON[0], "class": TUNED_ON[1], "tried": tried}
        results["chosen"] = {
            name: min((row for row in tried if row["method"] == name), key=lambda row: row["fid"])["option"]
            for name in {row["method"] for row in tried}
        }
    chosen = results.get("chosen", {})
    if "table" in parts:
        every = ["original", *([] if given.quick else ["retrain"]), *names]
        jobs = [
            (name, seed, forgotten, chosen.get(name, {}), steps, count)
            for name in every
            for seed in seeds
            for forgotten in classes
        ]
        rows = run(table_job, jobs, given.workers)
        results |= {
            "seeds": seeds,
            "classes": classes,
            "steps": steps,
            "samples": count,
            "runs": rows,
            "summary": summary(rows),
        }
        results["labels"] = {name: [spec["label"], spec["sees"]] for name, spec in METHODS.items()}
        if not given.quick:
            pictures(seeds[0], classes[0], steps)
    if "curve" in parts:
        jobs = [(name, seeds[0], forgotten, chosen.get(name, {}), marks, min(count, 500))
                for name in (CURVES if not given.quick else ("vdu",)) for forgotten in classes[:2]]  # fmt: skip
        results["curve"] = run(curve_job, jobs, given.workers)
    print(json.dumps(results.get("summary", {}), indent=1))
    if given.quick:
        return
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if "curve" in parts:
        draw_curves(results)


def pictures(seed: int, forgotten: int, steps: int) -> None:
    """Grids from the same noise: the original, unlearned and retrained."""
    trainer, _, _ = unlearned("vdu", seed, forgotten, {}, steps)
    folder = HERE.parent / "docs" / "pictures"
    models = {"original": original(seed), "unlearned": trainer.pipeline, "retrained": original(seed, forgotten)}
    for name, model in models.items():
        grid(draw(model, 64, seed=200 + seed), columns=16).save(folder / f"diffusion_digits_{name}.png")


def draw_curves(results: dict) -> None:
    folder = HERE.parent / "docs" / "pictures"
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
            folder / f"diffusion_unlearning_{key}.png",
            x_label="steps",
            y_label=label,
            log_x=True,
            levels=levels,
        )


if __name__ == "__main__":
    main()
