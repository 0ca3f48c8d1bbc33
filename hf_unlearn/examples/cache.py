"""Models that recipes, tests and benchmarks start from, trained on first use and kept outside the project."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import complete_or_not_there


RECIPE = "recipe.json"
FIRST, BETWEEN = 3.0, 30.0  # seconds to the first estimate of a training, and between two of them
MADE: dict[
    str, tuple[float, float]
] = {}  # what this process has made, and the seconds that it took: wall and processor
_ONLY_LOOK = ContextVar("only_look", default=False)


class NotMadeError(LookupError):
    """A model that is not there yet, where nothing is to be made."""


@contextmanager
def only_looking() -> Iterator[None]:
    """Within, what is not there is not made: [`NotMadeError`] says so."""
    before = _ONLY_LOOK.set(True)
    try:
        yield
    finally:
        _ONLY_LOOK.reset(before)


def cache_dir() -> Path:
    """`~/.cache/hf_unlearn`, or below `XDG_CACHE_HOME`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hf_unlearn")


def cached(name: str, recipe: Any, make: Callable[[Path], Any], *, progress: bool = True) -> Path:
    """Folder of the model that a recipe makes.

    Args:
        name (`str`): of the folder in [`cache_dir`].
        recipe (dataclass): what the model depends on; a folder of another recipe is made anew.
        make (callable): writes the model into a folder, with [`RECIPE`] by [`saved`] or [`write_recipe`].
        progress (`bool`, defaults to `True`): say on the error stream that it is made now.
    """

    def is_made(folder: Path) -> bool:
        file = folder / RECIPE
        return file.is_file() and json.loads(file.read_text()) == json.loads(json.dumps(asdict(recipe)))

    return made_once(name, is_made, make, progress=progress)


def made_once(
    name: str, is_made: Callable[[Path], bool], make: Callable[[Path], Any], *, progress: bool = True
) -> Path:
    """A folder in [`cache_dir`] that `make` writes unless `is_made`. It is complete or not there, and what a process that was
    killed left of it is removed.
    """
    folder = cache_dir() / name
    if is_made(folder):
        return folder
    if _ONLY_LOOK.get():
        raise NotMadeError(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for scratch in folder.parent.glob(f".{name}.*"):
        pid = scratch.name.rpartition(".")[2]
        if not (pid.isdecimal() and _runs(int(pid))):
            shutil.rmtree(scratch, ignore_errors=True)
    if progress:
        _say(f"{name} is used for the first time: it is trained now, once, and kept in {folder}")
    scratch = folder.with_name(f".{name}.{os.getpid()}")
    begun, cpu = time.monotonic(), time.process_time()
    try:
        make(scratch / name)
        MADE[name] = (time.monotonic() - begun, time.process_time() - cpu)
        if folder.exists() and not is_made(folder):
            shutil.rmtree(folder)
        if not folder.exists():  # else another process was faster
            os.replace(scratch / name, folder)
    except OSError:
        if not is_made(folder):
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def saved(recipe: Any, folder: str | Path) -> Iterator[Path]:
    """A folder to write what a recipe makes into; in its place with [`RECIPE`] at the end of a `with` block, or not there."""
    with complete_or_not_there(folder) as scratch:
        yield scratch
        write_recipe(recipe, scratch)


def write_recipe(recipe: Any, folder: Path) -> None:
    """Write what [`cached`] compares."""
    (folder / RECIPE).write_text(json.dumps(asdict(recipe)))


class Progress:
    """Says on the error stream, be it a terminal or a file, how long a training takes: measured on its first seconds.

    Args:
        name (`str`): what is trained.
        steps (`int`): how many there are.
        quiet (`bool`): say nothing.
        clock (callable): seconds.
    """

    def __init__(self, name: str, steps: int, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic):
        self.name, self.steps, self.quiet, self.clock = name, steps, quiet, clock
        self.done, self.begun, self.next = 0, 0.0, FIRST

    def step(self) -> None:
        """To be called after each step."""
        self.done += 1
        if self.done == 1:  # which takes longer than the others
            self.begun = self.clock()
            return
        passed = self.clock() - self.begun
        if passed >= self.next and self.done < self.steps and not self.quiet:
            self.next = passed + BETWEEN
            left = passed / (self.done - 1) * (self.steps - self.done)
            _say(f"training {self.name}: step {self.done:,} of {self.steps:,}, about {in_words(left)} to go")


def in_words(seconds: float) -> str:
    """As in `"40 seconds"` or `"3 minutes"`."""
    return f"{max(1, round(seconds))} seconds" if seconds < 90 else f"{round(seconds / 60)} minutes"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
