"""Where the acts play, what they have in common, and how they say what happens."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


# Of every trainer here: no logs, no checkpoints; each run still ends with its sentence.
QUIET: dict[str, Any] = {
    "report_to": "none",
    "logging_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
}


@dataclass
class Stage:
    """Where the acts play.

    Args:
        folder (`Path`): gets everything.
        forgotten (`int`): the digit that is forgotten as a whole.
        seed (`int`): of weights, orders, labels and latents.
        seconds (`dict[str, float]`): that each act took, by its title.
    """

    folder: Path
    forgotten: int
    seed: int
    seconds: dict[str, float] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    @property
    def mislabelled(self) -> int:
        """The digit of which a tenth carries wrong labels: another one."""
        return (self.forgotten + 5) % 10

    @contextmanager
    def act(self, title: str) -> Iterator[None]:
        """Says that an act begins, and notes how long it takes."""
        started = time.monotonic()
        print(f"\n{title}  ({started - self.begun:.0f} s)", flush=True)
        yield
        self.seconds[title] = time.monotonic() - started

    def say(self, text: str) -> None:
        print(f"  {text}", flush=True)


@contextmanager
def hushed() -> Iterator[None]:
    """Without the libraries' notes and bars; what runs and pipelines of hf_unlearn say of their outcome is still told."""
    import datasets
    import diffusers
    import transformers

    bars = [library for library in (transformers.logging, diffusers.logging) if library.is_progress_bar_enabled()]
    quiet = datasets.are_progress_bars_disabled()
    influence, verbosity = logging.getLogger("hf_unlearn.influence"), transformers.logging.get_verbosity()
    level = influence.level
    for library in bars:
        library.disable_progress_bar()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    influence.setLevel(logging.ERROR)  # it would say that the classifier has BatchNorm
    try:
        yield
    finally:
        influence.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
        for library in bars:
            library.enable_progress_bar()
        if not quiet:
            datasets.enable_progress_bars()
