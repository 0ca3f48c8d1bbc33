"""What is measured, row by row: quiet trainings, cells that are kept, and the files of results, with figures of four digits, a row a line, a row in
place of an older one; whole whenever another process reads them.
"""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from hf_unlearn.files import read_json


# Of a trainer that says nothing, writes nothing and asks for no GPU's memory.
QUIET = {
    "report_to": "none",
    "logging_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


class Measured:
    """One model that is measured, named by the fields of a dataclass that derives from this. What was measured is kept in the cache, and after a
    report in the results.

    Attributes:
        cache (`Path`): a folder, with a file for each.
        results (`Path`): where a report gathers them.
        version (`int`): of what is measured: cells of another one are measured again.
    """

    cache: ClassVar[Path]
    results: ClassVar[Path]
    version: ClassVar[int] = 1

    @property
    def file(self) -> Path:
        return self.cache / f"{self.name.replace(' ', '-')}.json"

    @property
    def name(self) -> str:
        return " ".join(map(str, asdict(self).values()))

    @property
    def settings(self) -> dict | None:
        """Of the method; None for what is not unlearnt."""
        raise NotImplementedError

    def kept(self) -> dict | None:
        """What was measured, on this machine or before, if it was so with these settings."""
        row = read_json(self.file) if self.file.is_file() else gathered_in(self.results).get(self.name, {})
        return row if (row.get("version"), row.get("settings")) == (self.version, self.settings) else None


@cache
def gathered_in(results: Path) -> dict[str, dict]:
    """Cells that a report has gathered."""
    return json.loads(results.read_text())["cells"] if results.is_file() else {}


def rounded(value: Any) -> Any:
    """Every number with a fraction in four digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def by_line(entries: dict) -> str:
    """JSON with an entry a line."""
    return "{\n" + ",\n".join(f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()) + "\n}"


def save(file: Path, text: str) -> None:
    partial = file.with_name(f"{file.name}.partial")  # another process may be reading
    partial.write_text(text + "\n")
    partial.replace(file)


def keep(
    file: Path,
    rows: Iterable[dict],
    by: tuple[str, ...],
    *,
    key: Callable | None = None,
    name: str = "rows",
    **about: Any,
) -> list[dict]:
    """Writes rows into a file of results, each in place of an older one.

    Args:
        file (`Path`): of the results, or where they will be.
        rows: to write.
        by: what says which row is in whose place.
        key (callable, *optional*): by which all are sorted. Default: older ones first.
        name (`str`, defaults to `"rows"`): what the file calls them.
        about: what else it says.

    Returns:
        `list[dict]`: all that are in the file now.
    """

    def place(row: dict) -> tuple:
        return tuple(row[one] for one in by)

    rows = list(rows)
    made = {place(row) for row in rows}
    older = json.loads(file.read_text())[name] if file.is_file() else []
    rows = [row for row in older if place(row) not in made] + rows
    if key is not None:
        rows.sort(key=key)
    parts = [f"{json.dumps(word)}: {json.dumps(value)},\n" for word, value in about.items()]
    save(file, f'{{{"".join(parts)}"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}")
    return rows


def high_water(begin: bool = False) -> float:
    """The most memory that this process has had since it was begun to be looked at, in MB (Linux)."""
    if begin:
        gc.collect()  # trainers hold themselves in circles
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
