"""Real handwritten digits in colour, on coloured ground, with captions: what a small text-to-image model learns from."""

from __future__ import annotations

import random
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from ..images import grey_images
from . import captions
from .digits import digits


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


SIZE = 16  # pixels in a row
DIGIT = 14  # pixels in a row of the digit, which lies anywhere inside
SHADE = 10.0  # standard deviation of each channel of a colour, of 255
RGB = {
    "colour": {
        "red": (225, 35, 40),
        "green": (30, 165, 60),
        "blue": (45, 75, 235),
        "yellow": (245, 215, 30),
        "purple": (160, 50, 200),
        "cyan": (30, 205, 215),
    },
    "background": {"black": (15, 15, 15), "white": (240, 240, 240), "grey": (128, 128, 128), "brown": (105, 65, 35)},
}


def coloured_digits(examples: int = 20_000, *, without: str | None = None, seed: int = 0) -> DatasetDict:
    """Pictures of one digit in one of six colours on one of four backgrounds, all three independent, each with a caption.

    Args:
        examples (`int`, defaults to 20000): pictures to learn from, before any are left out; a tenth as many more are held out.
        without (`str`, *optional*): a word such as `"three"` or `"red"`: no picture to learn from shows it, and no caption says
            it, by this word or by another one.
        seed (`int`, defaults to 0): of every choice.

    Returns:
        `DatasetDict`: `train`, and `test` of digits that are not in `train`, with columns `id`, `image` (16 × 16, RGB),
        `caption`, `digit`, `colour`, `background` (class labels) and `source` (the row in scikit-learn's array).

    Raises:
        ValueError: `without` names nothing that a picture shows.
    """
    from datasets import DatasetDict

    gone = None if without is None else captions.meaning(without, "without")
    splits = {
        "train": _drawn("train", examples, np.random.default_rng([seed, 0])),
        "test": _drawn("test", max(1, examples // 10), np.random.default_rng([seed, 1]), first=examples),
    }
    if gone is not None:
        kind, value = gone
        number = splits["train"].features[kind].str2int(value)
        kept = [row for row, label in enumerate(splits["train"][kind]) if label != number]
        splits["train"] = splits["train"].select(kept)
    return DatasetDict(splits)


@cache
def _handwritten(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ink from 0 to 1 `[n, 14, 14, 1]`, labels and ids of real digits; shared, so not to be changed."""
    rows = digits()[split]
    ink = (grey_images(rows, DIGIT).permute(0, 2, 3, 1).numpy() + 1) / 2
    return ink, np.array(rows["label"]), np.array(rows["id"])


def _drawn(split: str, count: int, rng: np.random.Generator, first: int = 0) -> Dataset:
    """`count` pictures of the digits of a split, with ids from `first`."""
    from datasets import ClassLabel, Dataset, Features, Image, Value
    from PIL import Image as PILImage

    handwritten, labels, sources = _handwritten(split)
    rows = rng.integers(len(labels), size=count)
    shown = [
        {"digit": str(label)} | {kind: str(rng.choice(list(values))) for kind, values in RGB.items()}
        for label in labels[rows]
    ]
    ink = np.zeros((count, SIZE, SIZE, 1))
    for picture, row, (y, x) in zip(ink, rows, rng.integers(0, SIZE - DIGIT + 1, (count, 2)), strict=True):
        picture[y : y + DIGIT, x : x + DIGIT] = handwritten[row]
    paper, pen = (
        (np.array([RGB[kind][row[kind]] for row in shown]) + rng.normal(0, SHADE, (count, 3)))[:, None, None]
        for kind in ("background", "colour")
    )
    pictures = (paper + ink * (pen - paper)).clip(0, 255).round().astype(np.uint8)
    writer = random.Random(int(rng.integers(2**63)))
    features = {"id": Value("int64"), "image": Image(), "caption": Value("string")}
    features |= {kind: ClassLabel(names=list(values)) for kind, values in captions.WORDS.items()}
    return Dataset.from_dict(
        {
            "id": range(first, first + count),
            "image": [PILImage.fromarray(picture) for picture in pictures],
            "caption": [captions.write(row, writer) for row in shown],
            **{kind: [row[kind] for row in shown] for kind in captions.WORDS},
            "source": sources[rows],
        },
        features=Features(features | {"source": Value("int64")}),
    )
