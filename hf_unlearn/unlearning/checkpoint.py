"""Checkpoints that are complete or not there: what an interrupted unlearning run goes on from."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..files import last_checkpoint_with


MARKER = "unlearning.json"  # written last: a checkpoint without it is half of one
FORMAT = 1


def mark_complete(checkpoint: str | Path, method: str, state: dict) -> None:
    """Declare a checkpoint complete, with the method's name and its own state."""
    partial = Path(checkpoint, MARKER + ".partial")
    partial.write_text(json.dumps({"format": FORMAT, "method": method, **state}))
    os.replace(partial, Path(checkpoint, MARKER))


def unmark(checkpoint: str | Path) -> None:
    """Declare a checkpoint, if there is one, incomplete: it is about to be written over."""
    Path(checkpoint, MARKER).unlink(missing_ok=True)


def read_marker(checkpoint: str | Path, method: str) -> dict:
    """What [`mark_complete`] wrote.

    Raises:
        ValueError: the checkpoint is incomplete, of another method or of another version of this file.
    """
    path = Path(checkpoint, MARKER)
    if not path.is_file():
        raise ValueError(
            f"resume_from_checkpoint: {str(checkpoint)!r} is no complete unlearning checkpoint (no {MARKER})"
        )
    state = json.loads(path.read_text())
    if state.get("method") != method:
        raise ValueError(
            f"resume_from_checkpoint: {str(checkpoint)!r} belongs to method {state.get('method')!r}, this is {method!r}; "
            "resume with the trainer that wrote it"
        )
    if state.get("format") != FORMAT:
        raise ValueError(
            f"resume_from_checkpoint: {str(checkpoint)!r} has format {state.get('format')}, this version reads {FORMAT}"
        )
    return state


def last_complete(output_dir: str | Path) -> str:
    """The newest complete checkpoint in a folder.

    Raises:
        ValueError: there is none.
    """
    found = last_checkpoint_with(output_dir, MARKER)
    if found is None:
        raise ValueError(f"resume_from_checkpoint: no complete checkpoint in {str(output_dir)!r}; start without it")
    return found
