"""Models that recipes, tests and benchmarks start from, trained on first use and kept outside the project."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any


RECIPE = "recipe.json"


def cache_dir() -> Path:
    """`~/.cache/hf_unlearn`, or below `XDG_CACHE_HOME`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hf_unlearn")


def cached(name: str, recipe: Any, make: Callable[[Path], Any]) -> Path:
    """Folder of the model that a recipe makes.

    Args:
        name (`str`): of the folder in [`cache_dir`].
        recipe (dataclass): what the model depends on; a folder of another recipe is made anew.
        make (callable): writes the model into a folder, with [`RECIPE`] by [`write_recipe`].
    """
    folder = cache_dir() / name
    made = folder / RECIPE
    if not made.is_file() or json.loads(made.read_text()) != json.loads(json.dumps(asdict(recipe))):
        shutil.rmtree(folder, ignore_errors=True)
        make(folder)
    return folder


def write_recipe(recipe: Any, folder: Path) -> None:
    """Write what [`cached`] compares."""
    (folder / RECIPE).write_text(json.dumps(asdict(recipe)))
