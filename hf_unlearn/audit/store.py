"""What checks read, kept model by model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..files import PRIVATE, read_json, write_json
from .check import AuditData, Check, Reading, Subject, timed
from .result import reading_of


class Store:
    """What checks read, model by model, below `output_dir/_private/`: an audit that was stopped goes on, and one of another model with the same
    references does not look at these again.
    """

    def __init__(self, output_dir: str | Path | None, rows: str, seed: int):
        self.folder = None if output_dir is None else Path(output_dir, PRIVATE, "audit", f"{rows}-{seed}")

    def kept(self, check: Check, subject: Subject) -> Reading | None:
        values = self.values(check.name, subject.digest)
        return None if values is None else reading_of(values["reading"])

    def keep(self, check: Check, subject: Subject, reading: Reading) -> Reading:
        self.keep_values({"reading": asdict(reading)}, check.name, subject.digest)
        return reading

    def values(self, *name: str) -> Mapping[str, Any] | None:
        """What was kept by that name, if this version did."""
        file = self._file(name)
        if file is None or not file.is_file():
            return None
        values = read_json(file)
        return values if values["version"] == __version__ else None

    def keep_values(self, values: Mapping[str, Any], *name: str) -> None:
        if file := self._file(name):
            write_json({"version": __version__, **values}, file)

    def _file(self, name: tuple[str, ...]) -> Path | None:
        return None if self.folder is None else self.folder.joinpath(*name[:-1], f"{name[-1]}.json")


def read_by(check: Check, subject: Subject, rows: AuditData, seed: int, store: Store) -> Reading:
    """What a check reads in a model, now or before; every check begins with the same random state."""
    reading = store.kept(check, subject) if check.is_kept else None
    if reading is not None:
        return reading
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[subject.device] if subject.device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence([seed, 17]).generate_state(1)[0]))
        reading = check.read(subject, rows, seed)
    reading = timed(reading, time.perf_counter() - started)
    return store.keep(check, subject, reading) if check.is_kept else reading
