"""Models that recipes, tests and benchmarks start from, trained on first use and kept outside the project."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import complete_or_not_there
from .datasets import images_of


RECIPE = "recipe.json"


def cache_dir() -> Path:
    """`~/.cache/hf_unlearn`, or below `XDG_CACHE_HOME`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hf_unlearn")


def cached(name: str, recipe: Any, make: Callable[[Path], Any]) -> Path:
    """Folder of the model that a recipe makes.

    Args:
        name (`str`): of the folder in [`cache_dir`].
        recipe (dataclass): what the model depends on; a folder of another recipe is made anew.
        make (callable): writes the model into a folder, by [`saved`].
    """
    folder = cache_dir() / name
    made = folder / RECIPE
    if not made.is_file() or json.loads(made.read_text()) != json.loads(json.dumps(asdict(recipe))):
        shutil.rmtree(folder, ignore_errors=True)
        make(folder)
    return folder


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
    return cached(name, recipe, lambda folder: train(recipe, images_of(recipe, without), folder, progress=progress))


@contextmanager
def saved(recipe: Any, folder: str | Path) -> Iterator[Path]:
    """A folder to write what a recipe makes into; in its place with [`RECIPE`] at the end of a `with` block, or not there."""
    with complete_or_not_there(folder) as scratch:
        yield scratch
        write_recipe(recipe, scratch)


def write_recipe(recipe: Any, folder: Path) -> None:
    """Write what [`cached`] compares."""
    (folder / RECIPE).write_text(json.dumps(asdict(recipe)))
