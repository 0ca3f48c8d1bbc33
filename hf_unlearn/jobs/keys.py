"""What the keys of several recipes mean, and how a job speaks."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console


if TYPE_CHECKING:
    from ..unlearning.config import UnlearnArguments


def resume_argument(config: UnlearnArguments) -> str | bool | None:
    """`resume_from_checkpoint` of a recipe, where every value is a word."""
    word = config.resume_from_checkpoint
    return {None: None, "false": None, "true": True}.get(word and word.lower(), word)


@contextmanager
def _named(key: str, value: Any, kind: str) -> Iterator[None]:
    """What goes wrong in loading names the key."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{key}={value!r}: neither a folder with {kind} nor an id on the Hub ({first_line(error)})"
        ) from error


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def show_code(lines: Sequence[str]) -> None:
    console().print("\n".join(f"    {line}".rstrip() for line in lines), markup=False)


def command_line(verb: str, arguments: Sequence[str]) -> str:
    return shlex.join(["hf-unlearn", *verb.split(), *arguments])
