"""Forgetting a class: PBU beside retraining, fine-tuning, ascent, random labels and the paper's own preset.

    python benchmarks/class_unlearning.py [--quick] [--fashion]

Digits: every class is forgotten once per seed, from models that no setting was chosen on. What a baseline needs to be told
(learning rate, epochs, BatchNorm mode) is chosen for it on the validation images, with the retained ones, on another seed:
more than a user who has only the forget set could do. Test images serve no choice, only the figures and the curve. Results go to
benchmarks/results/class_unlearning.json, the table to docs/benchmarks.md, the curves to docs/pictures/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import report
import torch
from datasets import Dataset
from rows import QUIET
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_unlearn import PBUConfig, PBUTrainer, UnlearnConfig, UnlearnTrainer
from hf_unlearn.examples.classifier import TRAINING, digits_model, digits_processor
from hf_unlearn.examples.datasets import digits
from hf_unlearn.metrics.classification import forget_retain_accuracy, per_class_accuracy
from hf_unlearn.plots import curves
from hf_unlearn.training.collators import RawCollator
from hf_unlearn.training.losses import cross_entropy


HERE = Path(__file__).parent
# The defaults until 2026-11, of the curve over epochs; beside them up to 20 epochs, and a look of the guard at the end of each.
FORMER = {"per_device_train_batch_size": 64, "fisher_weight": 0.14}
MARKS = (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100)


class RandomLabelTrainer(UnlearnTrainer):
    """The forget examples are taught labels drawn anew from the other classes."""

    _method = "random_labels"

    def forget_loss(self, model, batch):
        logits, targets = self.predictions(model, batch)
        generator = self._generator(self.state.global_step)
        shift = torch.randint(1, logits.shape[-1], targets.shape, generator=generator)
        return cross_entropy(logits, (targets + shift) % logits.shape[-1])


class Watch(TrainerCallback):
    """Predictions on tensors of images at the given epochs."""

    def __init__(self, epochs, images):
        self.epochs, self.images, self.answers = set(epochs), images, {}

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        epoch = round(state.epoch)
        if epoch in self.epochs:
            self.answers[epoch] = {name: answers(model, images) for name, images in self.images.items()}


@torch.no_grad()
def answers(model, images: torch.Tensor) -> np.ndarray:
    training = model.training
    model.eval()
    result = torch.cat([model(pixel_values=part).logits.argmax(-1) for part in images.split(512)]).numpy()
    model.train(training)
    return result


@contextmanager
def counted(model) -> Iterator[dict[str, float]]:
    """Counts examples through the model; a pass without gradients is a third of one with (forward, no backward)."""
    passes = {"examples": 0.0}

    def count(module, args, kwargs):
        images = kwargs.get("pixel_values", args[0] if args else None)
        passes["examples"] += len(images) * (1.0 if torch.is_grad_enabled() else 1 / 3)

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def ready(split) -> Dataset:
    batch = RawCollator(digits_processor(), "image")(list(split))
    rows = {"pixel_values": batch["pixel_values"].numpy(), "label": batch["labels"].numpy(), "id": split["id"][:]}
    return Dataset.from_dict(rows).with_format("torch")


def part(dataset: Dataset, label: int, inside: bool) -> Dataset:
    labels = np.asarray(dataset.with_format(None)["label"][:])
    return dataset.select(np.flatnonzero((labels == label) == inside))


class Digits:
    """The data as tensors, and the originals by seed."""

    def __init__(self):
        self.splits = {name: ready(split) for name, split in digits().items()}
        self.images = {name: split["pixel_values"][:] for name, split in self.splits.items()}
        self.labels = {name: np.asarray(split.with_format(None)["label"][:]) for name, split in self.splits.items()}
        self.originals, self.cost = {}, {}

    def original(self, seed: int):
        if seed not in self.originals:
            model = digits_model(seed)
            self.cost[seed] = stock_training(model, self.splits["train"], seed, TRAINING)
            self.originals[seed] = {k: v.clone() for k, v in model.state_dict().items()}
        model = digits_model(seed)
        model.load_state_dict(self.originals[seed])
        return model.eval()

    def score(self, predictions: np.ndarray, split: str, forgotten: int) -> dict:
        labels = self.labels[split]
        forget, retain = forget_retain_accuracy(predictions, labels, [forgotten])
        return {"forget": forget, "retain": retain, "per_class": per_class_accuracy(predictions, labels, 10).tolist()}


def stock_training(model, dataset, seed: int, settings: dict, watch: Watch | None = None) -> dict[str, float]:
    """Processor seconds, which hardly know who else is at work on the machine, and passes."""
    with tempfile.TemporaryDirectory() as folder, counted(model) as passes:
        arguments = TrainingArguments(folder, seed=seed, **QUIET, **settings)
        trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[watch] if watch else None)
        started = time.process_time()
        trainer.train()
        return {"seconds": time.process_time() - started, "passes": passes["examples"]}


def unlearn(trainer_class, config, model, forget, watch: Watch | None = None) -> dict[str, float]:
    with counted(model) as passes:
        callbacks = [watch] if watch else None
        trainer = trainer_class(model, config, forget_dataset=forget, callbacks=callbacks)
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started
    fisher = 0
    if trainer.fisher_weight:  # exact: one backward pass a class and example, unseen by the hook under vmap
        fisher = min(len(forget), config.fisher_examples or len(forget)) * model.config.num_labels
    return {"seconds": seconds, "passes": passes["examples"] + fisher, "steps": trainer.state.global_step}


def candidates(quick: bool) -> dict[str, list[tuple[str, callable]]]:
    """By baseline, its settings to choose among: a name and `(folder, seed, epochs) -> (trainer class, config)`."""

    def plain(trainer_class, **settings):
        off = {"forget_weight": 1.0, "replay_weight": 0.0, "isotropic_weight": 0.0, "guard": False}
        off |= {"per_device_train_batch_size": 64, "lr_scheduler_type": "constant", **QUIET, **settings}
        return lambda folder, seed, epochs: (
            trainer_class, UnlearnConfig(folder, seed=seed, num_train_epochs=epochs, **off)
        )  # fmt: skip

    grid = list(
        itertools.product((1e-4,) if quick else (3e-5, 1e-4, 3e-4), ("frozen",) if quick else ("frozen", "train"))
    )
    return {
        "ascent": [
            (f"lr {lr:g}, bn {bn}", plain(UnlearnTrainer, forget_loss="ascent", learning_rate=lr, bn=bn)) for lr, bn in grid
        ],
        "random_labels": [
            (f"lr {lr:g}, bn {bn}", plain(RandomLabelTrainer, forget_loss="uniform", learning_rate=lr, bn=bn)) for lr, bn in grid
        ],
        "pbu_paper_tuned": [
            ("preset", lambda folder, seed, epochs: (PBUTrainer, PBUConfig.paper(folder, seed=seed, num_train_epochs=epochs, **QUIET)))
        ],
    }  # fmt: skip


def choose(data: Digits, name: str, options, seed: int, classes, epochs) -> dict:
    """The option and epoch with the best retained validation accuracy among those that forget (≤ 1 % on average); if none
    does, the one that forgets most."""
    best = None
    for label, build in options:
        scores = []
        for forgotten in classes:
            model = data.original(seed)
            watch = Watch(epochs, {"validation": data.images["validation"]})
            with tempfile.TemporaryDirectory() as folder:
                trainer_class, config = build(folder, seed, max(epochs))
                unlearn(trainer_class, config, model, part(data.splits["train"], forgotten, True), watch)
            scores.append({e: data.score(watch.answers[e]["validation"], "validation", forgotten) for e in epochs})
        for epoch in epochs:
            forget = statistics.mean(score[epoch]["forget"] for score in scores)
            retain = statistics.mean(score[epoch]["retain"] for score in scores)
            rank = ranked(forget, retain)
            if best is None or rank > best["rank"]:
                best = {
                    "rank": rank,
                    "option": label,
                    "epoch": epoch,
                    "build": build,
                    "forget": forget,
                    "retain": retain,
                }
    print(
        f"  {name}: {best['option']}, {best['epoch']} epochs (validation {best['forget']:.3f} / {best['retain']:.3f})",
        flush=True,
    )
    return best


def ranked(forget: float, retain: float) -> tuple:
    """Forgetting first (at most 1 % on average), then retained accuracy; else the less remembered the better."""
    return (forget <= 0.01, retain if forget <= 0.01 else -forget)


def choose_fine_tuning(data: Digits, seed: int, classes, quick: bool) -> dict:
    """Learning rate and epochs of fine-tuning on retained data, up to the epochs of retraining, as for the other baselines."""
    best = None
    epochs = (1, 3, 5) if quick else (1, 3, 5, 10, 15)
    for lr in (1e-3,) if quick else (1e-3, 3e-3, 1e-2):
        scores = []
        for forgotten in classes:
            watch = Watch(epochs, {"validation": data.images["validation"]})
            retain = part(data.splits["train"], forgotten, False)
            stock_training(data.original(seed), retain, seed, fine_tuning(lr, max(epochs)), watch)
            scores.append({e: data.score(watch.answers[e]["validation"], "validation", forgotten) for e in epochs})
        for epoch in epochs:
            forget, retain = (statistics.mean(score[epoch][key] for score in scores) for key in ("forget", "retain"))
            if best is None or ranked(forget, retain) > best["rank"]:
                best = {"rank": ranked(forget, retain), "option": f"lr {lr:g}", "lr": lr, "epoch": epoch}
                best |= {"forget": forget, "retain": retain}
    print(
        f"  finetune: {best['option']}, {best['epoch']} epochs ({best['forget']:.3f} / {best['retain']:.3f})",
        flush=True,
    )
    return best


def fine_tuning(lr: float, epochs: int) -> dict:
    """Constant learning rate, so that a run's first epochs are a shorter run."""
    return TRAINING | {"learning_rate": lr, "num_train_epochs": epochs, "lr_scheduler_type": "constant"}


def rerun(stored: dict, method: str) -> None:
    """Replace the rows of one method in stored results; everything else stays as it was measured."""
    data, result = Digits(), stored["digits"]
    if method == "finetune":
        best = choose_fine_tuning(data, 0, (0, 2, 4, 6, 8), quick=False)
        kept = {k: best[k] for k in ("option", "epoch", "forget", "retain")}
        result["chosen"] = {"finetune": kept} | {k: v for k, v in result["chosen"].items() if k != "finetune"}
    pace = {}  # of this machine now against then: one model of each seed is retrained again, as the unit of time
    for row in result["rows"]:
        if row["method"] == "retrain" and row["seed"] not in pace:
            retain = part(data.splits["train"], row["class"], False)
            now = stock_training(digits_model(row["seed"] + 1000), retain, row["seed"], TRAINING)["seconds"]
            then = [r["seconds"] for r in result["rows"] if r["method"] == "retrain" and r["seed"] == row["seed"]]
            pace[row["seed"]] = statistics.median(then) / now
    for row in result["rows"]:
        if row["method"] != method:
            continue
        model, seed = data.original(row["seed"]), row["seed"]
        # On another machine it is another one, by an image or two.
        row["original"] = data.score(answers(model, data.images["test"]), "test", row["class"])
        forget, retain = (part(data.splits["train"], row["class"], inside) for inside in (True, False))
        if method == "finetune":
            cost = stock_training(model, retain, seed, fine_tuning(best["lr"], best["epoch"]))
        else:
            with tempfile.TemporaryDirectory() as folder:
                cost = unlearn(PBUTrainer, PBUConfig(folder, seed=seed, **QUIET), model, forget)
        cost["seconds"] *= pace[seed]
        row |= {**data.score(answers(model, data.images["test"]), "test", row["class"]), **cost}
    result["summary"] = summary(result)


def run_digits(quick: bool) -> dict:
    classes = (3, 8) if quick else range(10)
    seeds, tuning_seed = ((10,) if quick else (10, 11, 12)), 0
    epochs = (1, 2, 3, 5, 10, 20) if quick else MARKS
    data = Digits()
    print("choosing for the baselines, on validation images", flush=True)
    options = candidates(quick)
    tuning_classes = classes if quick else (0, 2, 4, 6, 8)
    chosen = {name: choose(data, name, options[name], tuning_seed, tuning_classes, epochs) for name in options}
    tuned = choose_fine_tuning(data, tuning_seed, tuning_classes, quick)
    rows = []

    def record(method, seed, forgotten, predictions, cost):
        rows.append(
            {"method": method, "seed": seed, "class": forgotten, **data.score(predictions, "test", forgotten), **cost}
        )

    curve = {"pbu": {}, "pbu_paper": {}}
    for seed in seeds:
        for forgotten in classes:
            forget, retain = (part(data.splits["train"], forgotten, inside) for inside in (True, False))
            test = data.images["test"]
            record("original", seed, forgotten, answers(data.original(seed), test), data.cost[seed])

            model = digits_model(seed + 1000)
            cost = stock_training(model, retain, seed, TRAINING)
            record("retrain", seed, forgotten, answers(model, test), cost)

            model = data.original(seed)
            cost = stock_training(model, retain, seed, fine_tuning(tuned["lr"], tuned["epoch"]))
            record("finetune", seed, forgotten, answers(model, test), cost)

            with tempfile.TemporaryDirectory() as folder:
                for method, best in chosen.items():
                    model = data.original(seed)
                    cost = unlearn(*best["build"](folder, seed, best["epoch"]), model, forget)
                    record(method, seed, forgotten, answers(model, test), cost)
                model = data.original(seed)
                cost = unlearn(PBUTrainer, PBUConfig.paper(folder, seed=seed, **QUIET), model, forget)
                record("pbu_paper", seed, forgotten, answers(model, test), cost)
                model = data.original(seed)
                cost = unlearn(PBUTrainer, PBUConfig(folder, seed=seed, **QUIET), model, forget)
                record("pbu", seed, forgotten, answers(model, test), cost)

                for method, config in (
                    (
                        "pbu",
                        PBUConfig(folder, seed=seed, guard=False, num_train_epochs=max(epochs), **FORMER, **QUIET),
                    ),
                    ("pbu_paper", PBUConfig.paper(folder, seed=seed, num_train_epochs=max(epochs), **QUIET)),
                ):
                    watch = Watch(epochs, {"test": test})
                    unlearn(PBUTrainer, config, data.original(seed), forget, watch)
                    for epoch, seen in watch.answers.items():
                        curve[method].setdefault(epoch, []).append(data.score(seen["test"], "test", forgotten))
            print(f"  seed {seed}, class {forgotten} done", flush=True)
    return {
        "classes": list(classes),
        "seeds": list(seeds),
        "chosen": {
            name: {k: best[k] for k in ("option", "epoch", "forget", "retain")}
            for name, best in ({"finetune": tuned} | chosen).items()
        },
        "rows": rows,
        "curve": {
            method: {
                epoch: {key: [round(score[key], 5) for score in scores] for key in ("forget", "retain")}
                for epoch, scores in points.items()
            }
            for method, points in curve.items()
        },
    }


def summary(result: dict) -> dict[str, dict[str, float]]:
    """By method: the means and worst cases that the table shows. Accuracies in percent, drops in points of percent."""
    by_method = {}
    for row in result["rows"]:
        by_method.setdefault(row["method"], []).append(row)
    at = {(row["method"], row["seed"], row["class"]): row for row in result["rows"]}
    shown = {}
    for method, rows in by_method.items():
        originals = [row.get("original", at["original", row["seed"], row["class"]]) for row in rows]
        drops = [100 * (row["retain"] - original["retain"]) for row, original in zip(rows, originals, strict=True)]
        class_drops = [
            100
            * (np.asarray(row["per_class"]) - np.asarray(original["per_class"]))[
                [c for c in range(10) if c != row["class"]]
            ]
            for row, original in zip(rows, originals, strict=True)
        ]
        retrained = [at["retrain", row["seed"], row["class"]] for row in rows]
        shown[method] = {
            "forget_mean": 100 * statistics.mean(row["forget"] for row in rows),
            "forget_worst": 100 * max(row["forget"] for row in rows),
            "retain_mean": 100 * statistics.mean(row["retain"] for row in rows),
            "drop_mean": statistics.mean(drops),
            "drop_worst": min(drops),
            "class_drop_worst": float(min(drop.min() for drop in class_drops)),
            "runs_with_a_class_below_-2": sum(bool((drop < -2).any()) for drop in class_drops),
            "mean_class_drop_worst": float(_mean_class_drop(rows, originals).min()),
            "against_retrained": statistics.mean(
                100 * (row["retain"] - other["retain"]) for row, other in zip(rows, retrained, strict=True)
            ),
            "passes_relative": statistics.mean(
                row["passes"] / r["passes"] for row, r in zip(rows, retrained, strict=True)
            ),
            "seconds_relative": statistics.median(
                row["seconds"] / r["seconds"] for row, r in zip(rows, retrained, strict=True)
            ),
        }
    return shown


def _mean_class_drop(rows: list[dict], originals: list[dict]) -> np.ndarray:
    """Change of each class's accuracy, averaged over all runs that were to keep it."""
    total, count = np.zeros(10), np.zeros(10)
    for row, original in zip(rows, originals, strict=True):
        keep = np.arange(10) != row["class"]
        total[keep] += 100 * (np.asarray(row["per_class"]) - np.asarray(original["per_class"]))[keep]
        count[keep] += 1
    return np.divide(total, count, where=count > 0, out=np.zeros(10))


def draw(result: dict) -> None:
    series = {}
    for method, name in (("pbu", "our defaults"), ("pbu_paper", "paper preset")):
        points = sorted((int(epoch), scores) for epoch, scores in result["curve"][method].items())
        for key, what in (("retain", "other classes"), ("forget", "forgotten class")):
            means = [100 * statistics.mean(scores[key]) for _, scores in points]
            series[f"{name}: {what}"] = ([epoch for epoch, _ in points], means)
    original = 100 * statistics.mean(row["retain"] for row in result["rows"] if row["method"] == "original")
    curves(
        series,
        HERE.parent / "docs" / "pictures" / "class_unlearning.png",
        x_label="epochs over the forget set (no guard)",
        y_label="test accuracy, %",
        levels={"original, other classes": original},
        log_x=True,
    )


def run_fashion() -> dict:
    """One class, two seeds, a ResNet-18: originals and retrained models come from the cache."""
    import fashion_mnist

    forgotten, rows = 6, []
    data = fashion_mnist.load()
    labels = np.asarray(data["test"].with_format(None)["label"][:])
    images = data["test"]["pixel_values"][:]
    forget = fashion_mnist.only(data["train"], forgotten)
    retained = len(data["train"]) - len(forget)
    retrain_passes = fashion_mnist.TRAINING["num_train_epochs"] * retained
    for seed in (0, 1):
        folders = {
            "original": fashion_mnist.trained("original", data["train"], seed),
            "retrain": fashion_mnist.trained(
                f"without-{forgotten}", fashion_mnist.without(data["train"], forgotten), seed
            ),
        }
        for method, folder in folders.items():
            model = AutoModelForImageClassification.from_pretrained(folder).eval()
            rows.append({"method": method, "seed": seed, **_score(answers(model, images), labels, forgotten)})
        model = AutoModelForImageClassification.from_pretrained(folders["original"])
        with tempfile.TemporaryDirectory() as folder:
            config = PBUConfig(
                folder, seed=seed, per_device_train_batch_size=64, max_steps=64, guard_steps=16, **QUIET
            )
            cost = unlearn(PBUTrainer, config, model, forget)
        cost["passes_relative"] = cost["passes"] / retrain_passes
        rows.append({"method": "pbu", "seed": seed, **_score(answers(model, images), labels, forgotten), **cost})
        print(rows[-3:], flush=True)
    return {"class": fashion_mnist.NAMES[forgotten], "rows": rows}


def _score(predictions, labels, forgotten) -> dict:
    forget, retain = forget_retain_accuracy(predictions, labels, [forgotten])
    return {"forget": forget, "retain": retain, "per_class": per_class_accuracy(predictions, labels, 10).tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="two classes, one seed: under two minutes; writes nothing"
    )
    parser.add_argument("--fashion", action="store_true", help="only the confirmation on Fashion-MNIST")
    parser.add_argument(
        "--again", choices=("finetune", "pbu"), help="measure one method again, beside the stored rows"
    )
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    file = HERE / "results" / "class_unlearning.json"
    stored = json.loads(file.read_text()) if file.exists() else {}
    if options.again:
        rerun(stored, options.again)
        print(report.class_table(stored["digits"]))
    elif options.fashion:
        stored["fashion_mnist"] = run_fashion()
    else:
        result = run_digits(options.quick)
        result["summary"] = summary(result)
        print(report.class_table(result))
        if options.quick:
            return
        stored["digits"] = result
        draw(result)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
