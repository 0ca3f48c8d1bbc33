"""Streams what a training run sees of its examples to Arrow files, with bounded memory, and reads it back.

A folder of records:

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
import operator
import os
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from transformers.utils import logging

from .observations import Observations, Steps, step_statistics
from .shuffling import Shuffling


logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
SAMPLES = "samples.arrow"
SHARD = re.compile(r"(rows|steps)-(\d{5,})\.arrow(\.partial)?")
ROW_COLUMNS = ("step", "example", "weight", "value")
STEP_COLUMNS = ("step", "weight", "size", "mean", "variance")
FORMAT = 1
SELF_WIDTH = 3  # gain on itself, mean gain of the batch on it, variance of that mean

ArrayOrTensor = np.ndarray | torch.Tensor


class Recorder:
    """Writes the observations of a run, step by step, as shards that are complete or absent.

    Shards are written when `rows_per_shard` rows are pending, so memory holds at most that many and one step. A caller
    that saves checkpoints calls [`~Recorder.flush`] before it declares one complete, and goes on from it with
    [`~Recorder.resume`].

    Tensors on an accelerator stay there until a shard is written, so a step costs no synchronisation; what is wrong
    with them is then said late, but with the step's number. Arrays and CPU tensors are checked at once.

    With targets `["self"]` a value is `[3]`: the gain of the example on itself, the batch's mean gain on it and the
    variance of that mean, NaN for a batch of one example, which is stored as 0: such a step tells nothing of it. Steps
    have no mean or variance of their own then; both are stored as `[steps, 1]` NaN.

    Args:
        folder (`str` or `Path`): of these records alone. **Records of an earlier run in it are removed**, other files
            are not touched.
        manifest (`Mapping`): what JSON can hold. `targets` (`list[str]`) has to be there, `run_id` (`str`) is drawn
            where it is not; the rest (observation, seed, versions, training settings) is kept as it is.
        sample_ids (`Sequence[int]` or `Sequence[str]`): `[examples]`, unique, in the order of the training set.
        rows_per_shard (`int`, defaults to 100_000): at least 1. A row is 12 bytes and 4 a target.

    Raises:
        ValueError: ids that are neither all `int` nor all `str` or not unique, a manifest without targets.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Mapping[str, Any],
        sample_ids: Sequence[int] | Sequence[str],
        *,
        rows_per_shard: int = 100_000,
    ):
        ids, manifest = _as_ids(sample_ids), {"run_id": uuid.uuid4().hex, **manifest}
        _check_manifest(manifest)
        self._set_up(folder, manifest, ids, rows_per_shard)
        self.folder.mkdir(parents=True, exist_ok=True)
        _remove(self.folder)
        _write_header(self.folder, manifest, ids)

    @classmethod
    def resume(
        cls,
        folder: str | Path,
        sample_ids: Sequence[int] | Sequence[str],
        step: int,
        *,
        rows_per_shard: int = 100_000,
    ) -> Recorder:
        """A recorder that goes on with the records in a folder: step `step` is the next one to be added.

        Records of `step` and later ones, of the part of the run that is about to be repeated, are dropped. A warning
        says so where records end before `step`: they were not flushed before the checkpoint, or no step was observed.

        Raises:
            ValueError: no records, or records of another training set.
        """
        folder = Path(folder)
        header, ids = _read_header(folder), _as_ids(sample_ids)
        if _digest(ids) != header["digest"]:
            raise ValueError(
                f"sample_ids: not those that {str(folder)!r} was started with; "
                "resume with the same training set in the same order, or start a new run"
            )
        recorder = cls.__new__(cls)
        recorder._set_up(folder, header["manifest"], ids, rows_per_shard)
        recorder._recorded = {
            recorded
            for number in _shards(folder)
            for recorded in _read_table(_file(folder, "steps", number))["step"].tolist()
        }
        last = max(recorder._recorded, default=-1)
        if last < step - 1:
            logger.warning(
                f"records in {str(folder)!r} end at step {last}, the run goes on at {step}: "
                "the steps between count as if they had not been"
            )
        _remove_leftovers(folder)
        recorder._next_shard = max(_shards(folder), default=-1) + 1
        recorder.truncate(step)
        return recorder

    def _set_up(self, folder: str | Path, manifest: Mapping[str, Any], ids: pa.Array, rows_per_shard: int) -> None:
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard={rows_per_shard!r}: must be at least 1")
        self.folder, self.manifest, self.rows_per_shard = Path(folder), dict(manifest), rows_per_shard
        self.is_self = list(manifest["targets"]) == ["self"]
        self._ids = ids
        self._width = SELF_WIDTH if self.is_self else len(manifest["targets"])
        self._recorded: set[int] = set()
        self._queue: list[_Batch] = []  # as they came, perhaps on an accelerator
        self._pending: list[_Step] = []
        self.pending_rows = 0
        self._next_shard = 0

    def __repr__(self) -> str:
        return (
            f"Recorder({str(self.folder)!r}: {len(self._ids):,} examples, {len(self._recorded):,} steps, "
            f"{self.pending_rows:,} rows pending)"
        )

    def add(
        self,
        step: int,
        examples: ArrayOrTensor,
        weight: ArrayOrTensor,
        value: ArrayOrTensor,
        variance: ArrayOrTensor | None = None,
    ) -> None:
        """Record one whole optimiser step. Steps may come in any order, each once.

        Args:
            step (`int`): counted from 0.
            examples (`[batch]` int): positions in `sample_ids`.
            weight (`[batch]`): predictions in each example, 1 for a classifier.
            value (`[batch, targets]`, or `[batch, 3]` for `"self"`): a_{t,i,c}; stored as float32.
            variance (`[targets]`, *optional*): σ²_{t,c} where the caller knows better than [`step_statistics`]; NaN
                where unknown.

        Raises:
            ValueError: wrong shapes, a step that is recorded already, or a number that is not finite.
        """
        step = operator.index(step)
        if step < 0 or step in self._recorded:
            raise ValueError(f"step={step}: " + ("is recorded already" if step >= 0 else "must be at least 0"))
        if variance is not None and self.is_self:
            raise ValueError("variance: with target 'self' it is the third column of value; leave variance out")
        given = (examples, weight, value, variance)
        tensors = [None if array is None else torch.as_tensor(array).detach() for array in given]
        size = len(tensors[0]) if tensors[0].ndim else 0
        shapes = {"examples": (size,), "weight": (size,), "value": (size, self._width), "variance": (self._width,)}
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            if tensor is not None and (tuple(tensor.shape) != shape or not size):
                raise ValueError(
                    f"{name}: shape {list(tensor.shape)} at step {step}; must be {list(shape)}, with at least 1 example"
                )
        self._recorded.add(step)
        self.pending_rows += size
        remote = any(tensor is not None and tensor.device.type != "cpu" for tensor in tensors)
        # The caller may reuse its buffers; a copy on the device does not wait for it.
        self._queue.append(
            _Batch(step, *(tensor.clone() if remote and tensor is not None else tensor for tensor in tensors))
        )
        if not remote:
            self._drain()
        if self.pending_rows >= self.rows_per_shard:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as a shard. Called with nothing pending it does nothing."""
        try:
            self._drain()
        finally:  # what came before a step that is refused is good
            if self._pending:
                self._write_pending()

    def _write_pending(self) -> None:
        steps, examples, weight, value, total, mean, variance = zip(*self._pending, strict=True)
        size = np.array([len(part) for part in weight])
        rows = {
            "step": np.repeat(np.array(steps, dtype=np.int32), size),
            "example": np.concatenate(examples),
            "weight": np.concatenate(weight),
            "value": np.concatenate(value),
        }
        whole = {"step": steps, "weight": total, "size": size, "mean": mean, "variance": variance}
        _write_shard(self.folder, self._next_shard, rows, {name: np.array(part) for name, part in whole.items()})
        self._next_shard += 1
        self._pending, self.pending_rows = [], 0

    def describe(self, **facts: Any) -> None:
        """Add to the manifest what is known only now.

        Raises:
            ValueError: JSON cannot hold it.
        """
        manifest = self.manifest | facts
        _check_manifest(manifest)
        self.manifest = manifest
        _write_header(self.folder, manifest, self._ids)

    def truncate(self, step: int) -> None:
        """Drop all of step `step` and later ones. A shard that holds earlier ones too is rewritten, no other."""
        self._drain()
        self._pending = [kept for kept in self._pending if kept.step < step]
        self.pending_rows = sum(len(kept.weight) for kept in self._pending)
        for number in reversed(_shards(self.folder)):
            paths = [_file(self.folder, kind, number) for kind in ("steps", "rows")]
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
        self._recorded = {recorded for recorded in self._recorded if recorded < step}

    def _drain(self) -> None:
        """Bring the queue to the CPU in one go, check it and compute the statistics of its steps."""
        if not self._queue:
            return
        queue, self._queue = self._queue, []
        ends = np.cumsum([len(batch.weight) for batch in queue]).tolist()
        examples = _gather([batch.examples for batch in queue], torch.int64)
        weight = _gather([batch.weight for batch in queue], torch.float32)
        value = _gather([batch.value for batch in queue], torch.float32)
        given = [batch.variance for batch in queue if batch.variance is not None]
        variances = iter(_gather(given, torch.float64).reshape(len(given), -1) if given else ())
        for position, (batch, end) in enumerate(zip(queue, ends, strict=True)):
            rows = slice(end - len(batch.weight), end)
            variance = None if batch.variance is None else next(variances)
            try:
                self._pending.append(self._checked(batch.step, examples[rows], weight[rows], value[rows], variance))
            except ValueError:
                self._recorded -= {refused.step for refused in queue[position:]}
                self.pending_rows -= sum(len(refused.weight) for refused in queue[position:])
                raise

    def _checked(
        self, step: int, examples: np.ndarray, weight: np.ndarray, value: np.ndarray, variance: np.ndarray | None
    ) -> _Step:
        def refuse(name: str, wrong: np.ndarray, numbers: np.ndarray, rule: str) -> None:
            if wrong.any():
                row = int(wrong.argmax())
                whose = "" if name == "examples" else f" for sample {self._ids[int(examples[row])].as_py()!r}"
                raise ValueError(f"{name}: {numbers[row].tolist()}{whose} at step {step}; must be {rule}")

        if self.is_self and len(value) == 1:
            value[np.isnan(value[:, 2]), 2] = 0.0
        ids = len(self._ids)
        refuse("examples", (examples < 0) | (examples >= ids), examples, f"a position in {ids} sample ids")
        refuse("weight", ~(np.isfinite(weight) & (weight >= 0)), weight, "finite and at least 0")
        refuse("value", ~np.isfinite(value).all(1), value, "finite in float32; is the training diverging?")
        if not weight.any():
            raise ValueError(f"weight: no predictions at all at step {step}; leave the step out")
        # From the values as they are stored, so that a batch less all of its rows leaves nothing.
        total, mean, own_variance = step_statistics(weight.astype(np.float64), value.astype(np.float64))
        if self.is_self:
            refuse("value", value[:, 2] < 0, value, "[gain, mean gain, variance] with a variance of at least 0")
            mean = own_variance = np.full(1, np.nan)
        variance = own_variance if variance is None else variance
        if (variance < 0).any() or np.isinf(variance).any():
            raise ValueError(f"variance: {variance.tolist()} at step {step}; must be finite and at least 0, or NaN")
        return _Step(step, examples.astype(np.int32), weight, value, total, mean, variance)


class _Batch(NamedTuple):
    """One call of [`Recorder.add`]."""

    step: int
    examples: torch.Tensor
    weight: torch.Tensor
    value: torch.Tensor
    variance: torch.Tensor | None


class _Step(NamedTuple):
    """One optimiser step, checked, as it will be written."""

    step: int
    examples: np.ndarray
    weight: np.ndarray
    value: np.ndarray
    total: float
    mean: np.ndarray
    variance: np.ndarray


def _gather(tensors: list[torch.Tensor], dtype: torch.dtype) -> np.ndarray:
    """A copy of all of them in a row on the CPU, by one transfer if they are on one device."""
    if len({tensor.device for tensor in tensors}) > 1:
        tensors = [tensor.cpu() for tensor in tensors]
    return torch.cat(tensors).to("cpu", dtype).numpy()


def read_observations(folder: str | Path) -> tuple[Observations, dict[str, Any]]:
    """What a [`Recorder`] or [`write_observations`] wrote, by step and in a step as it was added, and the manifest.

    The files are memory-mapped; the records of a single shard, written in order, are not copied.

    Raises:
        ValueError: there are no records, or they are damaged or of another version of this file.
    """
    folder = Path(folder)
    manifest = _read_header(folder)["manifest"]
    targets = manifest["targets"]
    shards = []
    for number in _shards(folder):
        steps, rows = (_read_table(_file(folder, kind, number)) for kind in ("steps", "rows"))
        if len(rows["step"]) != steps["size"].sum():  # a truncation was interrupted between its two files
            rows = _only(rows, np.isin(rows["step"], steps["step"]))
        if len(rows["step"]) != steps["size"].sum():
            raise ValueError(f"{str(_file(folder, 'rows', number))!r}: observations are missing; record the run again")
        shards.append((rows, steps))
    width = SELF_WIDTH if targets == ["self"] else len(targets)
    shards = shards or [(_no_columns(ROW_COLUMNS, width), _no_columns(STEP_COLUMNS, len(targets)))]
    rows, steps = (_by_step(parts) for parts in zip(*shards, strict=True))
    ids = _read_table(folder / SAMPLES)["sample_id"]
    found = Observations(
        sample_ids=ids,
        targets=tuple(targets),
        **rows,
        steps=Steps(**steps),
        shuffling=Shuffling(**manifest["shuffling"]) if manifest.get("shuffling") else None,
    )
    return found, manifest


def write_observations(folder: str | Path, observations: Observations, manifest: Mapping[str, Any]) -> None:
    """Write observations as one shard that [`read_observations`] reads; records that are in the folder are removed.

    Raises:
        ValueError: the manifest names other targets.
    """
    folder, ids = Path(folder), _as_ids(observations.sample_ids)
    _check_manifest(manifest)
    if tuple(manifest["targets"]) != observations.targets:
        raise ValueError(f"manifest: targets {manifest['targets']}, but the observations have {observations.targets}")
    folder.mkdir(parents=True, exist_ok=True)
    _remove(folder)
    if len(observations.steps.step):
        rows = {name: getattr(observations, name) for name in ROW_COLUMNS}
        _write_shard(folder, 0, rows, {name: getattr(observations.steps, name) for name in STEP_COLUMNS})
    _write_header(folder, manifest, ids)


# What is in a folder


def _file(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{kind}-{number:05d}.arrow"


def _shards(folder: Path) -> list[int]:
    """Numbers of the shards of which both files are there."""
    found = [SHARD.fullmatch(path.name) for path in folder.iterdir()]
    numbers = {
        kind: {int(match[2]) for match in found if match and match[1] == kind and not match[3]}
        for kind in ("rows", "steps")
    }
    return sorted(numbers["rows"] & numbers["steps"])


def _remove(folder: Path) -> None:
    """Remove all records: first the manifest, without which the rest is none."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in sorted(folder.iterdir(), reverse=True):  # steps before rows
        if SHARD.fullmatch(path.name) or path.name in (SAMPLES, f"{SAMPLES}.partial", f"{MANIFEST}.partial"):
            path.unlink()


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left: half of a file, half of a pair."""
    whole = set(_shards(folder))
    for path in list(folder.iterdir()):
        match = SHARD.fullmatch(path.name)
        if match and (match[3] or int(match[2]) not in whole):
            path.unlink()


def _write_shard(folder: Path, number: int, rows: Mapping[str, np.ndarray], steps: Mapping[str, np.ndarray]) -> None:
    _write_table(_file(folder, "rows", number), rows)
    _write_table(_file(folder, "steps", number), steps)  # now the shard is there


def _write_header(folder: Path, manifest: Mapping[str, Any], ids: pa.Array) -> None:
    _write_table(folder / SAMPLES, {"sample_id": ids})
    header = {"format": FORMAT, "samples": len(ids), "digest": _digest(ids), "manifest": dict(manifest)}
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(header, indent=2), encoding="utf-8")
    os.replace(partial, folder / MANIFEST)


def _read_header(folder: Path) -> dict[str, Any]:
    path = Path(folder, MANIFEST)
    if not path.is_file():
        raise ValueError(f"folder={str(folder)!r}: holds no records (no {MANIFEST}); record a run into it first")
    header = json.loads(path.read_text(encoding="utf-8"))
    if header.get("format") != FORMAT:
        raise ValueError(f"folder={str(folder)!r}: has format {header.get('format')}, this version reads {FORMAT}")
    return header


# Arrow


def _write_table(path: Path, columns: Mapping[str, np.ndarray | pa.Array]) -> None:
    batch = pa.record_batch({name: _as_arrow(column) for name, column in columns.items()})
    partial = path.with_name(f"{path.name}.partial")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    os.replace(partial, path)


def _read_table(path: Path) -> dict[str, np.ndarray]:
    with pa.memory_map(str(path)) as source:
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


def _check_manifest(manifest: Mapping[str, Any]) -> None:
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


def _as_ids(sample_ids: Iterable[Any]) -> pa.Array:
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


def _digest(ids: pa.Array) -> str:
    """Digest of the ids, their kind and their order."""
    digest = hashlib.blake2b(str(ids.type).encode(), digest_size=16)
    if pa.types.is_integer(ids.type):
        digest.update(ids.to_numpy().astype("<i8").tobytes())
    else:
        for value in ids.to_pylist():
            content = value.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
