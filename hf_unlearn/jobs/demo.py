"""The whole job on real images: train a digits classifier, make it forget one digit, check, save, load again.

`hf-unlearn demo` runs it; the pieces are what recipes and benchmarks on digits start from.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
)
from transformers.utils import logging as transformers_logging

from ..audit.membership import membership_by_entropy
from ..data import split_by_values
from ..examples.classifier import CLASSES, _quiet_bar, predict, train_classifier
from ..examples.datasets import digits
from ..metrics.classification import forget_retain_accuracy, per_class_accuracy


if TYPE_CHECKING:
    from .recipe.demo import DemoJob


def check(folder: str | Path, forgotten: int) -> dict[str, Any]:
    """A saved classifier's figures on the digits' test images, and the membership attack on the forgotten training images."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    splits = digits()
    forget, retain = split_by_values(splits["train"], "label", [forgotten])
    _, test_retain = split_by_values(splits["test"], "label", [forgotten])
    labels = np.asarray(splits["test"]["label"][:])
    answers = predict(model, processor, splits["test"]).argmax(-1)
    on_forgotten, on_retained = forget_retain_accuracy(answers, labels, [forgotten])
    return {
        "forget_accuracy": on_forgotten,
        "retain_accuracy": on_retained,
        "membership": membership_by_entropy(
            *(predict(model, processor, part) for part in (retain, test_retain, forget))
        ),
        "per_class": per_class_accuracy(answers, labels, len(CLASSES)).tolist(),
    }


def table(figures: Mapping[str, Mapping[str, Any]], forgotten: int, title: str) -> Table:
    """The comparison as text: one row a model."""
    result = Table(title=title, title_justify="left")
    result.add_column("model")
    for heading in (
        f"accuracy on {forgotten}",
        "accuracy on the rest",
        "worst other class",
        f"training {forgotten}s called members",
    ):
        result.add_column(heading, justify="right")
    for name, row in figures.items():
        others = [value for index, value in enumerate(row["per_class"]) if index != forgotten]
        values = (row["forget_accuracy"], row["retain_accuracy"], min(others), row["membership"])
        result.add_row(name, *(f"{100 * value:.1f} %" for value in values))
    return result


def run(output_dir: str | Path = "demo", forgotten: int = 3, seed: int = 0) -> Path:
    """Train, forget, compare, save, and print the table from the models as a new process loads them.

    Args:
        output_dir: gets `original/`, `unlearned/`, `retrained/`.
        forgotten (`int`): the digit to forget, 0…9.
        seed (`int`): of all three trainings.

    Returns:
        `Path`: folder of the unlearned model.

    Raises:
        ValueError: the folder holds an earlier demo.
    """
    from .. import PBUConfig, PBUTrainer
    from ..hub.card import Figure
    from ..plots import per_class_bars

    started = time.monotonic()
    console = Console(highlight=False)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folders = {name: Path(output_dir, name) for name in ("original", "unlearned", "retrained")}
    if Path(output_dir).is_dir() and any(Path(output_dir).iterdir()):
        raise ValueError(f"output_dir: {str(output_dir)!r} is not empty; empty it, or choose another folder")
    forget, retain = split_by_values(digits()["train"], "label", [forgotten])

    console.print(f"[bold]1/4[/] training a ResNet on {len(forget) + len(retain):,} digits")
    train_classifier(digits()["train"], folders["original"], seed=seed)

    console.print(f"[bold]2/4[/] making it forget class {forgotten}, from the {len(forget)} images of it alone")
    arguments = PBUConfig(
        str(folders["unlearned"]),
        seed=seed,
        report_to="none",
        logging_strategy="no",
        disable_tqdm=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = PBUTrainer(str(folders["original"]), arguments, forget_dataset=forget)
    _quiet_bar(trainer)
    trainer.train()
    trainer.save_model()

    console.print(f"[bold]3/4[/] training another from scratch on the {len(retain)} other digits, to compare")
    train_classifier(retain, folders["retrained"], seed=seed)

    console.print("[bold]4/4[/] checking")
    figures = {name: check(folder, forgotten) for name, folder in folders.items()}
    picture = per_class_bars(
        {name: row["per_class"] for name, row in figures.items()},
        CLASSES,
        [forgotten],
        folders["unlearned"] / "pictures" / "per_class.png",
    )
    trainer.base_model = None  # a folder on this machine: no one else could look it up
    trainer.card_values = {
        "model_name": f"digits-without-{forgotten}",
        "picture": "pictures/per_class.png",
        "dataset_name": "scikit-learn digits",
        "dataset_type": "digits",
        "license": "apache-2.0",
    }
    trainer.results = [
        Figure(metric="accuracy", name=label, split="test", unit="%", **{
            column: 100 * figures[model][key]
            for column, model in (("before", "original"), ("after", "unlearned"), ("retrained", "retrained"))
        })
        for key, label in (("forget_accuracy", "Accuracy on the forgotten class"), ("retain_accuracy", "Accuracy on the other classes"))
    ]  # fmt: skip
    card = folders["unlearned"] / "README.md"
    trainer.model_card(folders["unlearned"]).save(card)

    # What counts is what other people will load: a process that has never seen the trainer.
    names = json.dumps({name: str(folder) for name, folder in folders.items()})
    subprocess.run([sys.executable, "-m", "hf_unlearn.jobs.demo", names, str(forgotten)], check=True)
    console.print(f"model    {folders['unlearned']}\ncard     {card}\npicture  {picture}", markup=False)
    console.print(f"{time.monotonic() - started:.0f} s in all")
    return folders["unlearned"]


def run_demo(job: DemoJob) -> None:
    """The job of `hf-unlearn demo`."""
    run(job.output_dir, job.forgotten, job.seed)


def _report(folders: Mapping[str, str], forgotten: int) -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    figures = {name: check(folder, forgotten) for name, folder in folders.items()}
    Console(highlight=False, width=100).print(table(figures, forgotten, "Loaded again in a new process"))


if __name__ == "__main__":
    _report(json.loads(sys.argv[1]), int(sys.argv[2]))
