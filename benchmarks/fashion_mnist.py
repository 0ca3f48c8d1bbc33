"""Fashion-MNIST (Debian package `dataset-fashion-mnist`) and a ResNet-18-sized classifier of it, cached outside git."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

from hf_unlearn.examples.datasets import FASHION_MNIST, read_idx


CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hf_unlearn", "benchmarks")
NAMES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
TRAINING = {"num_train_epochs": 6, "learning_rate": 1e-3, "per_device_train_batch_size": 128, "weight_decay": 0.01}


def load() -> DatasetDict:
    """`train` (54,000), `validation` (6,000, the last of the training file) and `test` (10,000), as model inputs:
    `pixel_values` `[1, 28, 28]` in [−1, 1] and `label`.
    """
    if not FASHION_MNIST.is_dir():
        raise SystemExit(f"{FASHION_MNIST} is not there; install it with: apt-get install dataset-fashion-mnist")
    parts = {}
    for name, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(f"{prefix}-images-idx3-ubyte.gz").astype(np.float32)[:, None] / 127.5 - 1
        labels = read_idx(f"{prefix}-labels-idx1-ubyte.gz").astype(np.int64)
        parts[name] = Dataset.from_dict({"pixel_values": images, "label": labels}).with_format("torch")
    train = parts["train"]
    return DatasetDict(
        {
            "train": train.select(range(54_000)),
            "validation": train.select(range(54_000, 60_000)),
            "test": parts["test"],
        }
    )


def classifier(seed: int) -> ResNetForImageClassification:
    """ResNet-18 from a config (11.2 M parameters), one input channel, untrained."""
    set_seed(seed)
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            hidden_sizes=[64, 128, 256, 512],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            id2label=dict(enumerate(NAMES)),
            label2id={name: index for index, name in enumerate(NAMES)},
        )
    )


def trained(name: str, dataset: Dataset, seed: int) -> Path:
    """Folder of a classifier trained on `dataset`, from the cache if it was trained before."""
    folder = CACHE / f"fashion-{name}-{seed}"
    if not (folder / "config.json").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            arguments = TrainingArguments(
                scratch, seed=seed, save_strategy="no", logging_strategy="no", report_to="none", **TRAINING
            )
            model = classifier(seed)
            Trainer(model, arguments, train_dataset=dataset).train()
            model.save_pretrained(Path(scratch, "model"))
            os.replace(Path(scratch, "model"), folder)
    return folder


def without(dataset: Dataset, label: int) -> Dataset:
    """The rows of all other classes."""
    keep = (np.asarray(dataset.with_format(None)["label"][:]) != label).nonzero()[0]
    return dataset.select(keep)


def only(dataset: Dataset, label: int) -> Dataset:
    """The rows of one class."""
    return dataset.select((np.asarray(dataset.with_format(None)["label"][:]) == label).nonzero()[0])


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    data = load()
    for seed in (0, 1):
        trained("original", data["train"], seed)
        trained("without-6", without(data["train"], 6), seed)
