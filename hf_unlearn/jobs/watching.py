"""What a short run of a job is watched for, so that a whole one can be estimated: its steps, its batches, what memory holds."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback


MIN_STEPS, MIN_SECONDS = 8, 5.0  # a short run takes so many steps, and more where they are short
MIN_BATCHES = 6
PROFILED = 3  # step whose allocations are looked at, and which is not timed


class Clock:
    """Wall and processor seconds."""

    def __init__(self, wall: float | None = None, cpu: float | None = None):
        self.wall = time.monotonic() if wall is None else wall
        self.cpu = time.process_time() if cpu is None else cpu

    def __sub__(self, other: Clock) -> Clock:
        return Clock(self.wall - other.wall, self.cpu - other.cpu)

    def __add__(self, other: Clock) -> Clock:
        return Clock(self.wall + other.wall, self.cpu + other.cpu)

    def __mul__(self, factor: float) -> Clock:
        return Clock(factor * self.wall, factor * self.cpu)


class Watch(TrainerCallback):
    """A short run: stops a training after a few steps, and the drawing of samples after a few batches.

    Attributes:
        begins, ends ([`Clock`]): of each step, the first one included.
        planned (`int`): steps of the whole run.
        left_out (`list`): what was not drawn: `(title, batches, seconds of each)`.
        memory (`dict[str, int]`): bytes, by what holds them.
        while_running (`int`): bytes on disk that the end of a run removes.
    """

    def __init__(self, cut: bool = True):
        self.cut = cut
        self.begins: list[Clock] = []
        self.ends: list[Clock] = []
        self.planned = 0
        self.left_out: list[tuple[str, int, Clock]] = []
        self.memory: dict[str, int] = {}
        self.while_running = 0
        self.trained: Clock | None = None
        self.grows = False
        self._trainer: Any = None
        self._profiler: Any = None

    # Training

    def of(self, trainer: Any) -> Watch:
        self._trainer = trainer
        # The sweep after the last step takes every step of the run once more.
        self.grows = getattr(trainer, "observation", None) == "propagated"
        return self

    def on_step_begin(self, args, state, control, **kwargs):
        self.planned = state.max_steps
        if len(self.begins) + 1 == PROFILED:
            self.memory = held_by(self._trainer)
            os.environ.setdefault(
                "KINETO_LOG_LEVEL", "99"
            )  # torch 2.13 tells the error stream of every beginning and end
            self._profiler = profile(activities=[ProfilerActivity.CPU, *_gpu()], profile_memory=True)
            self._profiler.__enter__()
        self.begins.append(Clock())

    def on_step_end(self, args, state, control, **kwargs):
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            self.memory["activations"] = max(0, _peak(self._profiler, args.device) - self.memory["gradients"])
            self.memory |= {"optimiser": _size(_optimiser(self._trainer))}
            self._profiler = None
        self.ends.append(Clock())
        long_enough = (self.ends[-1] - self.begins[0]).wall >= MIN_SECONDS
        if len(self.ends) >= MIN_STEPS and long_enough:
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.trained = Clock()
        self.while_running = bytes_in(Path(args.output_dir, "_private", "trajectory"))

    @property
    def step(self) -> Clock:
        """What a step takes, with what is done between it and the next one; the first one and the profiled one do not count."""
        if not self.ends:
            return Clock(0.0, 0.0)
        if len(self.ends) <= PROFILED:
            return self.ends[-1] - self.begins[-1]
        return (self.ends[-1] - self.ends[PROFILED - 1]) * (1 / (len(self.ends) - PROFILED))

    # Drawing

    def batches(self, title: str, count: int, may_be_cut: bool) -> Iterator[int]:
        """Numbers of batches, as many as a short run draws."""
        begun: list[Clock] = []
        for number in range(count):
            if self.cut and may_be_cut and number == MIN_BATCHES:
                each = (Clock() - begun[1]) * (1 / (MIN_BATCHES - 1))
                self.left_out.append((title, count - number, each))
                return
            begun.append(Clock())
            yield number


_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)


def watch() -> Watch | None:
    """What watches the job that runs, if anything does."""
    return _WATCH.get()


@contextmanager
def watched(by: Watch) -> Iterator[Watch]:
    before = _WATCH.set(by)
    try:
        yield by
    finally:
        _WATCH.reset(before)


# Bytes


def held_by(trainer: Any) -> dict[str, int]:
    """Bytes that a trainer's tensors hold: weights, gradients, optimiser, reference, anchors and all others."""
    model = trainer.model
    weights = [*model.parameters(), *model.buffers()]
    parts: dict[str, Callable[[], Any]] = {
        "weights": lambda: weights,
        "optimiser": lambda: _optimiser(trainer),
        "reference": lambda: _tensors(getattr(trainer, "reference", None)),
        "anchors": lambda: _tensors(getattr(trainer, "anchor", None)),
        "others": lambda: [found for found in gc.get_objects() if _is_tensor(found) and not found.is_meta],
    }
    seen: set[int] = set()
    sizes = {name: _size(tensors(), seen) for name, tensors in parts.items()}
    sizes["gradients"] = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return sizes


def _optimiser(trainer: Any) -> list[torch.Tensor]:
    state = getattr(getattr(trainer, "optimizer", None), "state", {})
    return _tensors(dict(state))


def _tensors(found: Any, depth: int = 4) -> list[torch.Tensor]:
    if _is_tensor(found):
        return [found]
    if depth == 0 or found is None or isinstance(found, str | int | float):
        return []
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else None
    if parts is None:
        parts = vars(found).values() if hasattr(found, "__dict__") and not callable(found) else []
        if isinstance(found, torch.nn.Module):
            parts = [*found.parameters(), *found.buffers()]
        elif hasattr(found, "__dataclass_fields__"):
            parts = [getattr(found, name) for name in found.__dataclass_fields__]
    return [tensor for part in parts for tensor in _tensors(part, depth - 1)]


def _is_tensor(found: Any) -> bool:
    return issubclass(type(found), torch.Tensor)


def _size(tensors: list[torch.Tensor], seen: set[int] | None = None) -> int:
    """Of what they lie in, each counted once."""
    seen = set() if seen is None else seen
    total = 0
    for tensor in tensors:
        try:
            storage = tensor.untyped_storage()
            place, size = storage.data_ptr(), storage.nbytes()
        except (RuntimeError, NotImplementedError):  # of a functorch wrapper, or without a storage
            continue
        if place and place not in seen:
            seen.add(place)
            total += size
    return total


def _gpu() -> list[ProfilerActivity]:
    return [ProfilerActivity.CUDA] if torch.cuda.is_available() else []


def _peak(profiler: Any, device: torch.device) -> int:
    """The most bytes that a step's allocations held at once."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    wanted = DeviceType.CUDA if torch.device(device).type == "cuda" else DeviceType.CPU
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.device_type() == wanted:
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
