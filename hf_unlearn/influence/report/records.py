"""The records of a training run: what it saw of its examples, in a folder of Arrow files.

- `manifest.json`: format, digest of the sample ids, and what the caller says of the run. Written last: without it
  there are no records.
- `samples.arrow`: the sample ids.
- `rows-00000.arrow`, `steps-00000.arrow`, …: shards of whole optimiser steps. The steps file is written after the rows
  and is the truth: rows of steps that it does not list do not count. So a process may be killed between any two file
  operations, and what is left is the records of whole steps.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ...files import kept_private, read_json, undamaged
from .observations import Observations, Steps
from .shuffling import Shuffling


MANIFEST = "manifest.json"
SAMPLES = "samples.arrow"
SHARD = re.compile(r"(rows|steps)-(\d{5,})\.arrow(\.partial)?")
ROW_COLUMNS = ("step", "example", "weight", "value", "margin")
STEP_COLUMNS = ("step", "weight", "size", "mean", "variance")
FORMAT = 1
SELF_WIDTH = 3  # gain on itself, mean gain of the batch on it, variance of that mean


def read_observations(folder: str | Path) -> tuple[Observations, dict[str, Any]]:
    """What a [`Recorder`] or [`write_observations`] wrote, by step and in a step as it was added, and the manifest.

    The files are memory-mapped; the records of a single shard, written in order, are not copied.

    Raises:
        ValueError: there are no records, or they are damaged or of another version of this file.
    """
    folder = Path(folder)
    manifest = read_header(folder)["manifest"]
    targets = manifest["targets"]
    parts = []
    for number in shards(folder):
        steps, rows = (_read_table(_file(folder, kind, number)) for kind in ("steps", "rows"))
        if len(rows["step"]) != steps["size"].sum():  # a truncation was interrupted between its two files
            rows = _only(rows, np.isin(rows["step"], steps["step"]))
        if len(rows["step"]) != steps["size"].sum():
            raise ValueError(f"{str(_file(folder, 'rows', number))!r}: observations are missing; record the run again")
        rows.setdefault("margin", np.full(len(rows["step"]), np.nan))  # earlier versions did not record it
        parts.append((rows, steps))
    width = SELF_WIDTH if targets == ["self"] else len(targets)
    parts = parts or [(_no_columns(ROW_COLUMNS, width), _no_columns(STEP_COLUMNS, len(targets)))]
    rows, steps = (_by_step(tables) for tables in zip(*parts, strict=True))
    ids = _read_table(folder / SAMPLES)["sample_id"]
    found = Observations(
        sample_ids=ids,
        targets=tuple(targets),
        **rows,
        steps=Steps(**steps),
        shuffling=_shuffling(manifest.get("shuffling")),
        start=None if manifest.get("start") is None else np.array(manifest["start"]),
    )
    return found, manifest


def _shuffling(facts: Mapping[str, Any] | None) -> Shuffling | None:
    if not facts:
        return None
    if "variance" not in facts:
        raise ValueError("shuffling: the records are of an earlier version, whose σ was too large; train again")
    return Shuffling(facts["steps_per_epoch"], tuple(map(tuple, facts["variance"])), tuple(facts["steps"]))


def write_observations(folder: str | Path, observations: Observations, manifest: Mapping[str, Any]) -> None:
    """Write observations as one shard that [`read_observations`] reads; records that are in the folder are removed.

    Raises:
        ValueError: the manifest names other targets.
    """
    folder, ids = Path(folder), as_ids(observations.sample_ids)
    check_manifest(manifest)
    if tuple(manifest["targets"]) != observations.targets:
        raise ValueError(f"manifest: targets {manifest['targets']}, but the observations have {observations.targets}")
    folder.mkdir(parents=True, exist_ok=True)
    remove(folder)
    if len(observations.steps.step):
        rows = {name: getattr(observations, name) for name in ROW_COLUMNS}
        write_shard(folder, 0, rows, {name: getattr(observations.steps, name) for name in STEP_COLUMNS})
    shuffling = asdict(observations.shuffling) if observations.shuffling else None
    start = None if observations.start is None else observations.start.tolist()
    write_header(folder, {**manifest, "shuffling": shuffling, "start": start}, ids)


# What is in a folder


def _file(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{kind}-{number:05d}.arrow"


def shards(folder: Path) -> list[int]:
    """Numbers of the shards of which both files are there."""
    found = [SHARD.fullmatch(path.name) for path in folder.iterdir()]
    numbers = {
        kind: {int(match[2]) for match in found if match and match[1] == kind and not match[3]}
        for kind in ("rows", "steps")
    }
    return sorted(numbers["rows"] & numbers["steps"])


def remove(folder: Path) -> None:
    """Remove all records: first the manifest, without which the rest is none."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in sorted(folder.iterdir(), reverse=True):  # steps before rows
        if SHARD.fullmatch(path.name) or path.name in (SAMPLES, f"{SAMPLES}.partial", f"{MANIFEST}.partial"):
            path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left: half of a file, half of a pair."""
    whole = set(shards(folder))
    for path in list(folder.iterdir()):
        match = SHARD.fullmatch(path.name)
        if match and (match[3] or int(match[2]) not in whole):
            path.unlink()


def write_shard(folder: Path, number: int, rows: Mapping[str, np.ndarray], steps: Mapping[str, np.ndarray]) -> None:
    _write_table(_file(folder, "rows", number), rows)
    _write_table(_file(folder, "steps", number), steps)  # now the shard is there


def recorded_steps(folder: Path) -> set[int]:
    """Numbers of the steps that are in a shard."""
    return {step for number in shards(folder) for step in _read_table(_file(folder, "steps", number))["step"].tolist()}


def cut_shards(folder: Path, step: int) -> None:
    """Drop all of step `step` and later ones. A shard that holds earlier ones too is rewritten, no other."""
    for number in reversed(shards(folder)):
        paths = [_file(folder, kind, number) for kind in ("steps", "rows")]
        tables = [_read_table(path) for path in paths]
        if (tables[0]["step"] < step).all():
            continue
        # The steps first, as they are the truth: in between the rows file has rows too many, which do not count.
        for path, table in zip(paths, tables, strict=True):
            early = table["step"] < step
            if (tables[0]["step"] < step).any():
                _write_table(path, _only(table, early))
            else:
                path.unlink()


def write_header(folder: Path, manifest: Mapping[str, Any], ids: pa.Array) -> None:
    _write_table(folder / SAMPLES, {"sample_id": ids})
    header = {"format": FORMAT, "samples": len(ids), "digest": digest_of(ids), "manifest": dict(manifest)}
    with kept_private(folder / MANIFEST) as file:
        partial = folder / f"{MANIFEST}.partial"
        partial.write_text(json.dumps(header, indent=2), encoding="utf-8")
        os.replace(partial, file)


def read_header(folder: Path) -> dict[str, Any]:
    path = Path(folder, MANIFEST)
    if not path.is_file():
        raise ValueError(f"folder={str(folder)!r}: holds no records (no {MANIFEST}); record a run into it first")
    header = read_json(path)
    if header.get("format") != FORMAT:
        raise ValueError(f"folder={str(folder)!r}: has format {header.get('format')}, this version reads {FORMAT}")
    return header


# Arrow


def _write_table(path: Path, columns: Mapping[str, np.ndarray | pa.Array]) -> None:
    batch = pa.record_batch({name: _as_arrow(column) for name, column in columns.items()})
    with kept_private(path):
        partial = path.with_name(f"{path.name}.partial")
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        os.replace(partial, path)


def _read_table(path: Path) -> dict[str, np.ndarray]:
    with undamaged(path), pa.memory_map(str(path)) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
    return {name: _as_numpy(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}


def _as_arrow(column: np.ndarray | pa.Array) -> pa.Array:
    if isinstance(column, np.ndarray) and column.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(column).reshape(-1)), column.shape[1])
    return pa.array(column) if isinstance(column, np.ndarray) else column


def _as_numpy(array: pa.Array) -> np.ndarray:
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy().reshape(-1, array.type.list_size)
    return array.to_numpy(zero_copy_only=False)


def _only(columns: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: column[rows] for name, column in columns.items()}


def _no_columns(names: Sequence[str], width: int) -> dict[str, np.ndarray]:
    wide = ("value", "mean", "variance")
    whole = ("step", "example", "size")
    return {name: np.zeros((0, width) if name in wide else 0, dtype=int if name in whole else float) for name in names}


def _by_step(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts[1:] else parts[0]
    if (np.diff(joined["step"]) >= 0).all():
        return dict(joined)
    return _only(joined, np.argsort(joined["step"], kind="stable"))


# What the caller says


def check_manifest(manifest: Mapping[str, Any]) -> None:
    targets = manifest.get("targets")
    names = targets if isinstance(targets, (list, tuple)) else []
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"manifest: targets={targets!r}; must be a list of different names")
    if "self" in names and len(names) > 1:
        raise ValueError(f"manifest: targets={targets!r}; 'self' stands alone, rename the target set")
    try:
        json.dumps(dict(manifest))
    except (TypeError, ValueError) as error:
        raise ValueError(f"manifest: {error}; must be what JSON can hold") from error


def as_ids(sample_ids: Iterable[Any]) -> pa.Array:
    try:
        ids = pa.array(sample_ids if isinstance(sample_ids, np.ndarray) else list(sample_ids))
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        ids = pa.array([None])
    for is_kind, kind in ((pa.types.is_integer, pa.int64()), (pa.types.is_string, pa.large_string())):
        if is_kind(ids.type) and not ids.null_count:
            ids = ids.cast(kind)
            break
    else:
        raise ValueError("sample_ids: must all be int or all be str, and at least one")
    if len(distinct := ids.value_counts()) < len(ids):
        twice = next(entry["values"] for entry in distinct.to_pylist() if entry["counts"] > 1)
        raise ValueError(f"sample_ids: {twice!r} occurs more than once; every example needs an id of its own")
    return ids


def digest_of(ids: pa.Array) -> str:
    """Digest of the ids, their kind and their order."""
    digest = hashlib.blake2b(str(ids.type).encode(), digest_size=16)
    if pa.types.is_integer(ids.type):
        digest.update(ids.to_numpy().astype("<i8").tobytes())
    else:
        for value in ids.to_pylist():
            content = value.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
