"""What the benchmarks of generators share: real images, the classifiers that look at samples, and two processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from hf_unlearn.examples.cache import cache_dir
from hf_unlearn.examples.classifier import cached_digits_classifier, train_classifier
from hf_unlearn.examples.datasets import load
from hf_unlearn.images import grey_images
from hf_unlearn.metrics.features import ClassifierFeatures, Features, features_of
from hf_unlearn.metrics.generation import class_shift, density_coverage, frechet_distance, percentage_unlearned


PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
SIZES = {"digits": 8, "fashion_mnist": 16}
EPOCHS = {"digits": 15, "fashion_mnist": 3}  # of the classifiers


@cache
def images_of(task: str, everything: bool) -> tuple[Tensor, Tensor]:
    """Images and labels: all real ones (of Fashion-MNIST, the test split), or those that the models were trained on."""
    splits = load(task)
    parts = [splits["train"]] if not everything else splits.values() if task == "digits" else [splits["test"]]
    images = torch.cat([grey_images(rows, SIZES[task]) for rows in parts])
    return images, torch.tensor([label for rows in parts for label in rows["label"]])


def judge_folder(task: str, seed: int) -> Path:
    if task == "digits":
        return cached_digits_classifier(seed)
    folder = cache_dir() / f"{task}-resnet-{seed}"
    if not folder.exists():
        train_classifier(load(task)["train"], folder, seed=seed, progress=False, num_train_epochs=EPOCHS[task])
    return folder


@cache
def judge(task: str, seed: int = 0) -> ClassifierFeatures:
    """A classifier of all ten classes. That of seed 0 measures, and no method sees it."""
    return ClassifierFeatures.from_pretrained(judge_folder(task, seed))


@cache
def reference(task: str, forgotten: int | None) -> Features:
    """Of all real images, without a class if one is named."""
    images, labels = images_of(task, True)
    return features_of(images if forgotten is None else images[labels != forgotten], judge(task))


def called(task: str, forgotten: int, images: Tensor) -> Tensor:
    """Whether the classifier of a user, of another seed than the judge's, calls images forgotten."""
    return judge(task, 1).classify(images) == forgotten


def figures_of(images: Tensor, before: Tensor, task: str, forgotten: int) -> dict[str, float]:
    """Figures of a model's samples, `before` being the classes of the original's from the same noise."""
    images = images.nan_to_num()  # of a destroyed model
    after, fake = judge(task).classify(images), features_of(images, judge(task))
    result = percentage_unlearned(before, after, forgotten)
    gone = bool((after == forgotten).all())
    return {
        "pul": result.pul,
        "fid": frechet_distance(reference(task, forgotten), fake).distance,
        "coverage": density_coverage(reference(task, forgotten), fake).coverage,
        "shift": 100.0 if gone else 100 * class_shift(before, after, forgotten, 10).total_variation,
        "left": result.n_after,
        "before": result.n_before,
    }


# Two processes


def start() -> None:
    torch.set_num_threads(1)
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()


def run(function: Callable, jobs: list, workers: int) -> list[dict]:
    """`function` of every job, each a row that is printed when it comes."""
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


def grid_of(tuned: dict) -> list[dict]:
    """Every combination of the values of some settings."""
    options = [{}]
    for key, values in tuned.items():
        options = [option | {key: value} for option in options for value in values]
    return options
