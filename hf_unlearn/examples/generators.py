"""What the small generators share: their training images, and where they are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..images import grey_images
from .cache import cached
from .datasets import load


def cached_generator(kind: str, recipe: Any, train: Callable[..., Path], without: int | None, progress: bool) -> Path:
    """Folder of the small generator that a recipe makes from the training images of its dataset.

    Args:
        kind (`str`): `"ddpm"` or `"gan"`.
        recipe (dataclass): with `dataset`, `size` and `seed`.
        train (callable): of recipe, images and folder.
        without (`int`, *optional*): leave this class out.
    """
    name = f"{recipe.dataset.replace('_', '-')}-{kind}-{recipe.seed}" + (
        "" if without is None else f"-without-{without}"
    )
    return cached(
        name,
        recipe,
        lambda folder: train(recipe, images_of(recipe, without), folder, progress=progress),
        progress=progress,
    )


def images_of(recipe: Any, without: int | None = None) -> Tensor:
    """The training images of a recipe, all or without a class."""
    rows = load(recipe.dataset)["train"]
    if without is not None:
        rows = rows.select([row for row, label in enumerate(rows["label"]) if label != without])
    return grey_images(rows, recipe.size)
