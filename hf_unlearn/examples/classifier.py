"""A small classifier of digits, trained on first use."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from ..data import split_by_values
from ..files import complete_or_not_there
from ..modes import one_thread
from ..training.collators import RawCollator
from .cache import Progress, made_once
from .datasets import digits


CLASSES = [str(digit) for digit in range(10)]


TRAINING = {"num_train_epochs": 15, "learning_rate": 2e-3, "per_device_train_batch_size": 64, "weight_decay": 0.01}


SIZE = 16


def digits_processor() -> ViTImageProcessorPil:
    """Grey 8 × 8 images to `[1, 16, 16]` in [−1, 1]."""
    return ViTImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, do_convert_rgb=False, image_mean=[0.5], image_std=[0.5]
    )


def digits_model(seed: int = 0) -> ResNetForImageClassification:
    """A ResNet of 171,000 parameters, untrained."""
    set_seed(seed)
    names = dict(enumerate(CLASSES))
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=32,
            hidden_sizes=[32, 64],
            depths=[2, 2],
            layer_type="basic",
            id2label=names,
            label2id={name: index for index, name in names.items()},
        )
    )


def train_classifier(dataset, output_dir: str | Path, *, seed: int = 0, progress: bool = True, **overrides: Any):
    """Train [`digits_model`] with stock [`~transformers.Trainer`] and save it with its processor.

    Args:
        dataset (`Dataset`): with `image` and `label`.
        output_dir: folder for `from_pretrained`; complete or not there.
        seed (`int`): of initialisation and order.
        progress (`bool`): say how long it takes.
        overrides: training arguments in place of [`TRAINING`].
    """
    processor = digits_processor()
    with complete_or_not_there(output_dir) as scratch, tempfile.TemporaryDirectory() as run, one_thread():
        arguments = TrainingArguments(
            output_dir=run,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            **(TRAINING | overrides),
        )
        model = digits_model(seed)
        trainer = Trainer(model, arguments, train_dataset=dataset, data_collator=RawCollator(processor, "image"))
        quiet_bar(trainer)
        trainer.add_callback(Told(Path(output_dir).name, quiet=not progress))
        trainer.train()
        model.save_pretrained(scratch)
        processor.save_pretrained(scratch)
    return model.eval()


class Told(TrainerCallback):
    """[`Progress`] of a [`~transformers.Trainer`]."""

    def __init__(self, name: str, *, quiet: bool):
        self.name, self.quiet = name, quiet

    def on_train_begin(self, args, state, control, **kwargs):
        self.progress = Progress(self.name, state.max_steps, quiet=self.quiet)

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.step()


class _Bar(ProgressCallback):
    """A progress bar without the logs printed between its lines."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


def quiet_bar(trainer: Trainer) -> None:
    """Leave the progress bar, if there is one, and print no logs."""
    for callback in (ProgressCallback, PrinterCallback):
        if trainer.pop_callback(callback) is not None and callback is ProgressCallback:
            trainer.add_callback(_Bar())


def cached_digits_classifier(seed: int = 0, *, without: Sequence[int] = (), progress: bool = True) -> Path:
    """Folder of a classifier of all ten digits, or of one that never saw those in `without`, trained on first use (seconds)."""

    def make(folder: Path) -> None:
        rows = digits()["train"]
        kept = split_by_values(rows, "label", list(without))[1] if without else rows
        train_classifier(kept, folder, seed=seed, progress=progress)

    never_saw = "".join(f"-without-{digit}" for digit in sorted(without))
    return made_once(
        f"digits-resnet{never_saw}-{seed}", lambda folder: (folder / "config.json").is_file(), make, progress=progress
    )


@torch.no_grad()
def predict(model, processor, dataset, batch_size: int = 256) -> np.ndarray:
    """Logits of a classifier on a dataset with `image`: `[n, classes]`."""
    collate = RawCollator(processor, "image")
    model.eval()
    rows = dataset.select_columns(["image"])
    batches = (rows.select(range(i, min(i + batch_size, len(rows)))) for i in range(0, len(rows), batch_size))
    return np.concatenate([model(**collate(list(batch))).logits.float().cpu().numpy() for batch in batches])
