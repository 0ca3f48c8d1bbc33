"""The job of `hf-unlearn estimate`: what a run would take, from a short one in a folder that is removed."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import resource
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from ..examples.cache import MADE, in_words
from ..files import PRIVATE, first_line, sized
from .keys import console
from .recipe.methods import Method
from .watching import Clock, Watch, bytes_in, watched


CHECKPOINT = "checkpoint-"
PARTS = ("weights", "gradients", "optimiser", "reference", "anchors", "activations", "others")


@dataclass(frozen=True)
class Estimate:
    """What a run would take.

    Attributes:
        seconds, cpu_seconds (`float`): of the command, wall and processor.
        time (`dict[str, float]`): seconds of its parts: `before`, `step` (`cpu_step` by the processor), `steps`, `drawing`, `after`; and `once`, for small models that
            were made for the first time, which is not in `seconds`.
        measured_steps, steps (`int`): that were taken, and that a whole run takes at most.
        memory (`int`): bytes at the peak, of the process on a CPU, of what PyTorch holds on a GPU.
        memory_parts (`dict[str, int]`): bytes: weights, gradients, optimiser, reference, anchors, activations of a step, other tensors.
        disk (`int`): bytes that stay in the end.
        disk_parts (`dict[str, int]`): `published`, `private`, `checkpoints`; and `while_running`, which the end of a run removes.
        device (`str`): that it was measured on.
    """

    seconds: float
    cpu_seconds: float
    time: dict[str, float]
    measured_steps: int
    steps: int
    memory: int
    memory_parts: dict[str, int]
    disk: int
    disk_parts: dict[str, int]
    device: str


def run_estimate(method: Method, values: Mapping[str, Any], begun: tuple[float, float]) -> dict[str, Any]:
    """Make a short run, and say what a whole one would take.

    Args:
        method, values: what would be run.
        begun: when the command began, as in [`Document`][hf_unlearn.jobs.recipe.document]: its imports are a part of every run.

    Raises:
        ValueError: several processes, or what the run itself refuses.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("estimate: runs in one process; start it without accelerate launch")
    for cut in (True, False):
        with tempfile.TemporaryDirectory(prefix="hf_unlearn_estimate_") as folder:
            try:
                found = _short_run(method, values, Clock(*begun), Path(folder), Watch(cut))
                break
            except ValueError as error:
                if not cut or "samples" not in str(error):
                    raise ValueError(first_line(error).replace(folder, str(values.get("output_dir")))) from error
    _tell(found, values)
    return {"estimate": found}


def _short_run(method: Method, values: Mapping[str, Any], begun: Clock, folder: Path, looks: Watch) -> Estimate:
    scratch = _in_scratch(method, values, folder)
    made_before = dict(MADE)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run = method.runner(method.job_of(scratch), scratch)
    with watched(looks), _silently():
        run()
    once = Clock(0.0, 0.0)
    for name, seconds in MADE.items():
        once = once if made_before.get(name) == seconds else once + Clock(*seconds)
    time_parts, total = _time(looks, begun + once, Clock())
    on_gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
    memory = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parts = {name: looks.memory[name] for name in PARTS if name in looks.memory}
    disk, disk_parts = _disk(looks, folder, scratch)
    return Estimate(
        seconds=total.wall,
        cpu_seconds=total.cpu,
        time=time_parts | {"once": once.wall},
        measured_steps=len(looks.ends),
        steps=looks.planned,
        memory=memory,
        memory_parts=parts,
        disk=disk,
        disk_parts=disk_parts,
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
    )


def _in_scratch(method: Method, values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The same run, but nothing is resumed, reported or pushed, and all is written below a folder."""
    changed = {"push_to_hub": False, "report_to": ["none"], "resume_from_checkpoint": None, "disable_tqdm": True}
    changed |= {name: str(folder / name) for name in values if name.endswith("_dir")}
    keys = method.keys
    return {**values, **{name: value for name, value in changed.items() if name in keys}}


@contextlib.contextmanager
def _silently() -> Iterator[None]:
    """What a run says of itself is not of this one."""
    level, verbosity = logging.root.manager.disable, transformers_logging.get_verbosity()
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _time(looks: Watch, begun: Clock, ended: Clock) -> tuple[dict[str, float], Clock]:
    drawing = Clock(0.0, 0.0)
    for _, batches, each in looks.left_out:
        drawing = drawing + each * batches
    if not looks.ends:
        total = ended - begun + drawing
        return {"before": (ended - begun).wall, "drawing": drawing.wall}, total
    before, after = looks.begins[0] - begun, ended - looks.ends[-1]
    first = looks.ends[0] - looks.begins[0]
    if looks.grows and looks.trained is not None:
        after = after * (looks.planned / len(looks.ends))
    steps = first + looks.step * max(0, looks.planned - 1)
    total = before + steps + drawing + after
    return {
        "before": before.wall,
        "step": looks.step.wall,
        "cpu_step": looks.step.cpu,
        "steps": steps.wall,
        "drawing": drawing.wall,
        "after": after.wall,
    }, total


def _disk(looks: Watch, folder: Path, scratch: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    checkpoints = [path for path in folder.rglob(f"{CHECKPOINT}*") if path.is_dir()]
    one = max((bytes_in(path) for path in checkpoints), default=0)
    in_checkpoints = sum(bytes_in(path) for path in checkpoints)
    private = sum(bytes_in(path) for path in folder.rglob(PRIVATE) if path.parent.parent == folder)
    published = bytes_in(folder) - private - in_checkpoints
    count = _checkpoints(looks, scratch) if checkpoints else 0
    grown = looks.planned / len(looks.ends) if looks.ends else 1.0
    parts = {
        "published": published,
        "private": private,
        "checkpoints": one * count,
        "while_running": round(looks.while_running * grown),
    }
    return published + private + one * count, parts


def _checkpoints(looks: Watch, scratch: Mapping[str, Any]) -> int:
    """How many stay at the end of a whole run."""
    args = looks._trainer.args
    strategy = getattr(args.save_strategy, "value", args.save_strategy)
    if strategy == "no":
        return 0
    if strategy == "epoch":
        count = looks._trainer.state.num_train_epochs
    else:
        every = args.save_steps if args.save_steps >= 1 else max(1, round(args.save_steps * looks.planned))
        count = -(-looks.planned // every)
    return min(count, args.save_total_limit or count)


# What a user reads


def _tell(found: Estimate, values: Mapping[str, Any]) -> None:
    out, parts = console(), found.time
    words = [f"{in_words(parts['before'])} before the first step" if found.steps else in_words(parts["before"])]
    if found.steps:
        words.append(f"{found.steps:,} steps of {parts['step']:.2g} s ({found.measured_steps} measured)")
        words.append(f"{in_words(parts['after'])} after them")
    if parts.get("drawing"):
        words.append(f"{in_words(parts['drawing'])} of drawing that was cut short")
    out.print(f"time     about {in_words(found.seconds)}: {', '.join(words)}")
    if found.steps:
        out.print("         at most: a guard or a target may end it earlier")
    if parts["once"]:
        out.print(
            f"         the first time {in_words(parts['once'])} more, for small models that were made now and are kept"
        )
    out.print(f"memory   about {sized(found.memory)} on {found.device}")
    held = [f"{name} {sized(size)}" for name, size in found.memory_parts.items()]
    if held:
        out.print(f"         of which {', '.join(held)}; the rest are libraries and data")
    disk = found.disk_parts
    listed = ", ".join(f"{name} {sized(disk[name])}" for name in ("published", "private", "checkpoints"))
    out.print(f"disk     about {sized(found.disk)} in {values.get('output_dir')}: {listed}")
    if disk["while_running"]:
        out.print(f"         and {sized(disk['while_running'])} while it runs")
