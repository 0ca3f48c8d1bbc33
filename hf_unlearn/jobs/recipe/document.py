"""What a command says to machines: with `--json`, one line of JSON on the output stream, and all else on the error stream."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from ...files import PRIVATE


LISTED = 1000  # files, at most


@dataclass
class Document:
    """What is to be said of one command.

    Args:
        json (`bool`, defaults to `False`): to machines.
        dry_run (`bool`, defaults to `False`): nothing is to be run.
        said (`dict`): what has been said so far.
        begun (`tuple[float, float]`): when the command began, by the clocks of `time.monotonic` and `time.process_time`.
    """

    json: bool = False
    dry_run: bool = False
    said: dict[str, Any] = field(default_factory=dict)
    begun: tuple[float, float] = field(default_factory=lambda: (time.monotonic(), time.process_time()))


_CURRENT: ContextVar[Document | None] = ContextVar("document", default=None)


def current() -> Document:
    """The document of the command that runs; of none, one that nobody reads."""
    return _CURRENT.get() or Document()


def say(**values: Any) -> None:
    """Add to what the command says to machines, as in `say(figures=…, verdict=…)`. Jobs may also return such a mapping."""
    current().said.update(values)


@contextmanager
def document(json: bool, dry_run: bool) -> Iterator[Document]:
    """While the command runs. At its end its document is printed, if it is for machines, by the first of several processes."""
    found = Document(json, dry_run)
    before = _CURRENT.set(found)
    since = time.time()
    try:
        with _to_the_error_stream() if json else nullcontext():
            yield found
    except BaseException as error:
        found.said.setdefault("exit_code", 1)
        found.said.setdefault("error", f"{type(error).__name__}: {error}")
        raise
    finally:
        _CURRENT.reset(before)
        if json and os.environ.get("RANK", "0") == "0":
            said = found.said | {"seconds": round(time.monotonic() - found.begun[0], 3)}
            folder = said.get("output_dir")
            if folder and not dry_run and Path(folder).is_dir():
                said |= _written(Path(folder), since)
            print(one_line(said), flush=True)


@contextmanager
def _to_the_error_stream() -> Iterator[None]:
    """What this process and those that it starts print."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _written(folder: Path, since: float) -> dict[str, Any]:
    """Files of a folder that are new or were changed; of its private ones only that there are some."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_mtime >= since - 1)
    names = [file.relative_to(folder).as_posix() for file in files]
    public = [name for name in names if not name.startswith(f"{PRIVATE}/")]
    return {"written": public[:LISTED], "private": str(folder / PRIVATE) if len(public) < len(names) else None}


def one_line(values: Mapping[str, Any]) -> str:
    """As JSON, which has no NaN and no infinity: null."""
    return json.dumps(_plain(values), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(part) for part in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, bool) or value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # of numpy and torch
        return _plain(value.tolist())
    return str(value)
