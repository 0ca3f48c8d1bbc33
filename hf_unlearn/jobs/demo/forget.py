"""FORGET: first the answers that wrong labels taught, then a whole class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.trainer_callback import PrinterCallback

from hf_unlearn import PBUConfig, PBUTrainer, UnlearnConfig, UnlearnTrainer
from hf_unlearn.data import split_by_values
from hf_unlearn.examples.classifier import predict, train_classifier
from hf_unlearn.metrics.classification import per_class_accuracy

from .find import Found
from .stage import QUIET, Stage


@dataclass(frozen=True)
class Answers:
    """What one classifier says of the images whose labels were made wrong, and of all test images.

    Args:
        wrong, right, other (`int`): images of which it says the wrong label, the digit they show, or a third one.
        accuracy (`float`): on the test images, in [0, 1].
        said (`list[int]`): of each of those images.
    """

    wrong: int
    right: int
    other: int
    accuracy: float
    said: list[int]


@dataclass(frozen=True)
class Corrected:
    """What the second act leaves: the trainer whose model forgot the wrong answers, and what three models answer."""

    trainer: UnlearnTrainer
    retrained: str
    answers: dict[str, Answers]

    @property
    def model(self) -> str:
        return self.trainer.args.output_dir


@dataclass(frozen=True)
class Forgotten:
    """What the third act leaves: the trainer whose model forgot a class, and the accuracy of each class by model, `[10]` in [0, 1]."""

    trainer: PBUTrainer
    forget: Dataset
    retain: Dataset
    retrained: str
    accuracy: dict[str, list[float]]

    @property
    def model(self) -> str:
        return self.trainer.args.output_dir

    def on(self, model: str, digit: int) -> tuple[float, float]:
        """Accuracy on a digit, and the mean over the others."""
        values = self.accuracy[model]
        return values[digit], float(np.mean([value for other, value in enumerate(values) if other != digit]))


def forget_answers(stage: Stage, found: Found, splits: DatasetDict) -> Corrected:
    """The suspects lose the answer that they taught. Nobody looks at them before: what is no wrong label among them is treated alike."""
    stage.say(f"the classifier unlearns what it says of the {len(found.suspects)} suspects, from these images alone")
    trainer = without_answers(stage, found)
    retrained = train(stage, found.kept, "retrained/without-suspects")
    folders = {"original": found.model, "unlearned": trainer.args.output_dir, "retrained": retrained}
    said = {name: answers(path, found, splits) for name, path in folders.items()}
    for name, one in said.items():
        stage.say(
            f"{name:9}  the wrong label {one.wrong:2}, the digit itself {one.right:2} of {len(one.said)}; "
            f"test accuracy {100 * one.accuracy:.1f} %"
        )
    return Corrected(trainer, retrained, said)


def without_answers(stage: Stage, found: Found) -> UnlearnTrainer:
    """An image stays what it is: it is its label that must go. `redirect` teaches what the original says when that label is left out."""
    trainer = UnlearnTrainer(
        found.model,
        args=UnlearnConfig(
            str(stage.folder / "corrected"),
            forget="examples",
            forget_loss="redirect",
            replay_weight=1.0,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            num_train_epochs=40,
            per_device_train_batch_size=16,
            seed=stage.seed,
            **QUIET,
        ),
        forget_dataset=found.suspects.select_columns(["id", "image", "label"]),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    return trainer


def answers(folder: str, found: Found, splits: DatasetDict) -> Answers:
    """Asks a saved classifier."""
    planted = split_by_values(found.train, "wrong", [True])[0]
    digits = dict(zip(splits["train"]["id"], splits["train"]["label"], strict=True))
    said = asked(folder, planted).tolist()
    wrong = sum(one == label for one, label in zip(said, planted["label"], strict=True))
    right = sum(one == digits[row] for one, row in zip(said, planted["id"], strict=True))
    accuracy = (asked(folder, splits["test"]) == np.array(splits["test"]["label"])).mean()
    return Answers(wrong, right, len(said) - wrong - right, float(accuracy), said)


def forget_class(stage: Stage, corrected: Corrected, found: Found, splits: DatasetDict) -> Forgotten:
    """The corrected classifier forgets a digit. Another one is trained from scratch without it, to compare."""
    digit = stage.forgotten
    forget, retain = split_by_values(found.kept.select_columns(["id", "image", "label"]), "label", [digit])
    stage.say(f"PBU: the {digit} is forgotten from its {len(forget)} images; the other {len(retain)} are not touched")
    trainer = without_class(stage, corrected.model, forget)
    retrained = train(stage, retain, f"retrained/without-{digit}-0")
    folders = {"original": corrected.model, "unlearned": trainer.args.output_dir, "retrained": retrained}
    accuracy = {name: by_class(path, splits["test"]) for name, path in folders.items()}
    forgotten = Forgotten(trainer, forget, retain, retrained, accuracy)
    for name in folders:
        on_it, on_others = forgotten.on(name, digit)
        stage.say(f"{name:9}  accuracy on the {digit} {100 * on_it:5.1f} %, on the others {100 * on_others:.1f} %")
    return forgotten


def without_class(stage: Stage, model: str, forget: Dataset) -> PBUTrainer:
    """Nothing but images of the class is needed."""
    trainer = PBUTrainer(
        model,
        args=PBUConfig(str(stage.folder / "unlearned"), seed=stage.seed, **QUIET),
        forget_dataset=forget,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    return trainer


def train(stage: Stage, rows: Dataset, name: str, number: int = 0) -> str:
    """Folder of a classifier that is trained from scratch on other rows, with a seed of its own."""
    folder = stage.folder / name
    train_classifier(rows, folder, seed=stage.seed + 1000 + number)
    return str(folder)


def by_class(folder: str, rows: Dataset) -> list[float]:
    """Accuracy of a saved classifier on each digit, `[10]` in [0, 1]."""
    return per_class_accuracy(asked(folder, rows), np.array(rows["label"]), 10).tolist()


def asked(folder: str, rows: Dataset) -> np.ndarray:
    """What a saved classifier says of images, `[n]`."""
    return logits(folder, rows).argmax(-1)


def logits(folder: str, rows: Dataset) -> np.ndarray:
    """`[n, 10]`."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    return predict(model, AutoImageProcessor.from_pretrained(folder), rows)
