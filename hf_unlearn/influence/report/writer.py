"""Streams what a training run sees of its examples to its [`records`], with bounded memory."""

from __future__ import annotations

import operator
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from transformers.utils import logging

from . import records
from .observations import step_statistics


logger = logging.get_logger(__name__)

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
        ids, manifest = records.as_ids(sample_ids), {"run_id": uuid.uuid4().hex, **manifest}
        records.check_manifest(manifest)
        self._set_up(folder, manifest, ids, rows_per_shard)
        self.folder.mkdir(parents=True, exist_ok=True)
        records.remove(self.folder)
        records.write_header(self.folder, manifest, ids)

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
        header, ids = records.read_header(folder), records.as_ids(sample_ids)
        if records.digest_of(ids) != header["digest"]:
            raise ValueError(
                f"sample_ids: not those that {str(folder)!r} was started with; "
                "resume with the same training set in the same order, or start a new run"
            )
        recorder = cls.__new__(cls)
        recorder._set_up(folder, header["manifest"], ids, rows_per_shard)
        recorder._recorded = records.recorded_steps(folder)
        last = max(recorder._recorded, default=-1)
        if last < step - 1:
            logger.warning(
                f"records in {str(folder)!r} end at step {last}, the run goes on at {step}: "
                "the steps between count as if they had not been"
            )
        records.remove_leftovers(folder)
        recorder._next_shard = max(records.shards(folder), default=-1) + 1
        recorder.truncate(step)
        return recorder

    def _set_up(self, folder: str | Path, manifest: Mapping[str, Any], ids: pa.Array, rows_per_shard: int) -> None:
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard={rows_per_shard!r}: must be at least 1")
        self.folder, self.manifest, self.rows_per_shard = Path(folder), dict(manifest), rows_per_shard
        self.is_self = list(manifest["targets"]) == ["self"]
        self._ids = ids
        self._width = records.SELF_WIDTH if self.is_self else len(manifest["targets"])
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
        margin: ArrayOrTensor | None = None,
    ) -> None:
        """Record one whole optimiser step. Steps may come in any order, each once.

        Args:
            step (`int`): counted from 0.
            examples (`[batch]` int): positions in `sample_ids`. One that comes twice is stored once, with its weights added.
            weight (`[batch]`): predictions in each example, 1 for a classifier.
            value (`[batch, targets]`, or `[batch, 3]` for `"self"`): a_{t,i,c}; stored as float32.
            variance (`[targets]`, *optional*): σ²_{t,c} where the caller knows better than [`step_statistics`]; NaN
                where unknown.
            margin (`[batch]`, *optional*): how much more probable each example's label is than the best other one; NaN where unknown.

        Raises:
            ValueError: wrong shapes, a step that is recorded already, or a number that is not finite.
        """
        step = operator.index(step)
        if step < 0 or step in self._recorded:
            raise ValueError(f"step={step}: " + ("is recorded already" if step >= 0 else "must be at least 0"))
        if variance is not None and self.is_self:
            raise ValueError("variance: with target 'self' it is the third column of value; leave variance out")
        given = (examples, weight, value, variance, margin)
        tensors = [None if array is None else torch.as_tensor(array).detach() for array in given]
        size = len(tensors[0]) if tensors[0].ndim else 0
        shapes = {"examples": (size,), "weight": (size,), "value": (size, self._width), "variance": (self._width,)}
        shapes["margin"] = (size,)
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
        steps, examples, weight, value, margin, total, mean, variance = zip(*self._pending, strict=True)
        size = np.array([len(part) for part in weight])
        rows = {
            "step": np.repeat(np.array(steps, dtype=np.int32), size),
            "example": np.concatenate(examples),
            "weight": np.concatenate(weight),
            "value": np.concatenate(value),
            "margin": np.concatenate(margin),
        }
        columns = {"step": steps, "weight": total, "size": size, "mean": mean, "variance": variance}
        whole = {name: np.array(column) for name, column in columns.items()}
        records.write_shard(self.folder, self._next_shard, rows, whole)
        self._next_shard += 1
        self._pending, self.pending_rows = [], 0

    def describe(self, **facts: Any) -> None:
        """Add to the manifest what is known only now.

        Raises:
            ValueError: JSON cannot hold it.
        """
        manifest = self.manifest | facts
        records.check_manifest(manifest)
        self.manifest = manifest
        records.write_header(self.folder, manifest, self._ids)

    def truncate(self, step: int) -> None:
        """Drop all of step `step` and later ones. A shard that holds earlier ones too is rewritten, no other."""
        self._drain()
        self._pending = [kept for kept in self._pending if kept.step < step]
        self.pending_rows = sum(len(kept.weight) for kept in self._pending)
        records.cut_shards(self.folder, step)
        self._recorded = {recorded for recorded in self._recorded if recorded < step}

    def _drain(self) -> None:
        """Bring the queue to the CPU in one go, check it and compute the statistics of its steps."""
        if not self._queue:
            return
        queue, self._queue = self._queue, []
        ends = np.cumsum([len(batch.weight) for batch in queue]).tolist()
        examples = _gather([batch.examples for batch in queue], torch.int64)
        weight = _gather([batch.weight for batch in queue], torch.float32)
        # The margins go along with the values, as one column more.
        value = _gather([torch.column_stack([batch.value, batch.known_margin()]) for batch in queue], torch.float32)
        given = [batch.variance for batch in queue if batch.variance is not None]
        variances = iter(_gather(given, torch.float64).reshape(len(given), -1) if given else ())
        for position, (batch, end) in enumerate(zip(queue, ends, strict=True)):
            rows = slice(end - len(batch.weight), end)
            variance = None if batch.variance is None else next(variances)
            try:
                self._pending.append(self._checked(batch.step, examples[rows], weight[rows], value[rows], variance))
                self.pending_rows += len(self._pending[-1].weight) - len(batch.weight)
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

        examples, weight, value = _once(examples, weight, value)
        value, margin = value[:, :-1], value[:, -1]
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
        return _Step(step, examples.astype(np.int32), weight, value, margin, total, mean, variance)


class _Batch(NamedTuple):
    """One call of [`Recorder.add`]."""

    step: int
    examples: torch.Tensor
    weight: torch.Tensor
    value: torch.Tensor
    variance: torch.Tensor | None
    margin: torch.Tensor | None

    def known_margin(self) -> torch.Tensor:
        return (
            self.weight.new_full((len(self.weight),), torch.nan, dtype=torch.float32)
            if self.margin is None
            else self.margin
        )


class _Step(NamedTuple):
    """One optimiser step, checked, as it will be written."""

    step: int
    examples: np.ndarray
    weight: np.ndarray
    value: np.ndarray
    margin: np.ndarray
    total: float
    mean: np.ndarray
    variance: np.ndarray


def _once(examples: np.ndarray, weight: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each example once, with all its predictions: it may come twice in a step, as when processes share out rows that they cannot
    divide, and would leave the batch twice, each time alone.
    """
    found, first, row = np.unique(examples, return_index=True, return_inverse=True)
    if len(found) == len(examples):
        return examples, weight, value
    total = np.bincount(row, weight)
    share = np.where(total[row] > 0, weight / np.maximum(total[row], 1e-30), 1 / np.bincount(row)[row])
    merged = np.zeros((len(found), value.shape[1]))
    np.add.at(merged, row, share[:, None] * value)
    order = np.argsort(first)
    return found[order], total[order].astype(weight.dtype), merged[order].astype(value.dtype)


def _gather(tensors: list[torch.Tensor], dtype: torch.dtype) -> np.ndarray:
    """A copy of all of them in a row on the CPU, by one transfer if they are on one device."""
    if len({tensor.device for tensor in tensors}) > 1:
        tensors = [tensor.cpu() for tensor in tensors]
    return torch.cat(tensors).to("cpu", dtype).numpy()
