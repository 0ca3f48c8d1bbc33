"""Models that recipes, tests and benchmarks start from, trained on first use and kept outside the project."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any


RECIPE = "recipe.json"


def cache_dir() -> Path:
    """`~/.cache/hf_unlearn`, or below `XDG_CACHE_HOME`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hf_unlearn")


@contextmanager
def complete_or_not_there(folder: str | Path) -> Iterator[Path]:
    """A scratch folder that becomes `folder` at the end of a `with` block; nothing is left where the block fails."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        yield Path(scratch)
        try:
            shutil.copytree(scratch, unfinished := folder.with_name(f"{folder.name}.{os.getpid()}"))
            os.replace(unfinished, folder)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            if not folder.is_dir():  # else another process was faster
                raise


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
