"""Checkpoints of a run of any Trainer: where they are, what their steps were, and what their optimiser had learned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_utils import sort_checkpoints

from ...files import PRIVATE, first_line, read_json
from ...training.runs import MARKER


STATE, OPTIMIZER = "trainer_state.json", "optimizer.pt"


@dataclass(frozen=True)
class Checkpoint:
    """One `checkpoint-<step>`.

    Attributes:
        folder (`Path`): of it.
        step (`int`): optimiser steps before it.
        epoch (`float`): epochs before it.
        logged (`list[dict]`): what the run had logged.
        max_steps (`int`): of the run.
    """

    folder: Path
    step: int
    epoch: float
    logged: list[dict[str, Any]]
    max_steps: int


def checkpoints_of(given: str | Path | Sequence[str | Path]) -> list[Checkpoint]:
    """Those in an `output_dir`, or those that are named, by step.

    Of a folder whose run is of this package, those of its last run alone.

    Raises:
        ValueError: there are none, one is not whole, or two are of the same step.
    """
    if isinstance(given, str | Path):
        folders = [Path(p) for p in sort_checkpoints(str(given)) if re.fullmatch(r"checkpoint-\d+", Path(p).name)]
        run = Path(given, PRIVATE, MARKER)
        if run.is_file():
            own = read_json(run).get("run")
            folders = [f for f in folders if (f / MARKER).is_file() and read_json(f / MARKER).get("run") == own]
        folders = [folder for folder in folders if (folder / STATE).is_file()]
    else:
        folders = [Path(folder) for folder in given]
    if not folders:
        raise ValueError(
            f"checkpoints: {str(given)!r} holds no whole checkpoint-<step>; train with save_strategy, or pass the model"
        )
    found = []
    for folder in folders:
        if not (folder / STATE).is_file():
            raise ValueError(
                f"checkpoints: {str(folder)!r} is no whole checkpoint of a Trainer (no {STATE}); leave it out"
            )
        state = read_json(folder / STATE)
        step, epoch = int(state.get("global_step") or 0), float(state.get("epoch") or 0)
        if step < 1 or epoch <= 0:
            raise ValueError(f"checkpoints: {str(folder / STATE)!r} tells no step and epoch; leave the checkpoint out")
        found.append(
            Checkpoint(folder, step, epoch, state.get("log_history") or [], int(state.get("max_steps") or step))
        )
    found.sort(key=lambda one: one.step)
    for before, after in zip(found, found[1:], strict=False):
        if before.step == after.step:
            raise ValueError(
                f"checkpoints: {str(before.folder)!r} and {str(after.folder)!r} are of the same step; leave one out"
            )
    return found


def has_checkpoints(folder: str | Path) -> bool:
    return Path(folder).is_dir() and any(re.fullmatch(r"checkpoint-\d+", p.name) for p in Path(folder).iterdir())


# Optimisers


@dataclass(frozen=True)
class Optimizer:
    """What a checkpoint's optimiser makes of a gradient, θ ← (1 − η·decay) θ − η P∘g, for each parameter.

    Attributes:
        rate (`float`): η of the group that moves most, as the checkpoint has it.
        preconditioner (`dict[str, Tensor]`): P, the group's rate relative to that one and momentum's factor in it.
        decay (`dict[str, float]`): weight decay.
        adaptive (`bool`): P is not the same for all.
    """

    rate: float
    preconditioner: dict[str, Tensor]
    decay: dict[str, float]
    adaptive: bool


def optimizer_of(
    checkpoint: Checkpoint, parameters: dict[str, nn.Parameter], grouped: Sequence[Sequence[str]]
) -> Optimizer | None:
    """SGD, with momentum or without, Adam or AdamW, by what the file says; None where there is no file, or another optimiser's.

    Args:
        parameters: those that are wanted, by name.
        grouped: names of all trainable parameters in the groups that `Trainer` makes.

    Raises:
        ValueError: the file is damaged, or of a model with other parameters.
    """
    file = checkpoint.folder / OPTIMIZER
    if not file.is_file():
        return None
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        groups, states = saved["param_groups"], saved["state"]
    except Exception as error:  # whatever unpickling may raise
        raise ValueError(
            f"checkpoints: {str(file)!r} cannot be read ({first_line(error)}); remove it to go without"
        ) from error
    order = [index for group in groups for index in group["params"]]
    names = [name for group in grouped for name in group]
    if len(order) != len(names):
        raise ValueError(
            f"checkpoints: {str(file)!r} is of {len(order)} parameters, the model trains {len(names)}; pass it as it was trained"
        )
    of = dict(zip(names, order, strict=True))
    group_of = {index: group for group in groups for index in group["params"]}
    kinds = {key for state in states.values() for key in state}
    if not kinds <= {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"}:
        return None
    rate = max(float(group["lr"]) for group in groups)
    base = max(float(group.get("initial_lr", group["lr"])) for group in groups) or 1.0
    preconditioner, decay = {}, {}
    for name, parameter in parameters.items():
        group, state = group_of[of[name]], states.get(of[name], {})
        factor = float(group.get("initial_lr", group["lr"])) / base
        if momentum := float(group.get("momentum") or 0):
            factor *= (1 - float(group.get("dampening") or 0)) / (1 - momentum)
        if "exp_avg_sq" in state:
            if state["exp_avg_sq"].shape != parameter.shape:
                raise ValueError(
                    f"checkpoints: {str(file)!r} has another shape than the model's {name}; pass the model as it was trained"
                )
            corrected = state["exp_avg_sq"].float() / (1 - group["betas"][1] ** float(state["step"]))
            preconditioner[name] = (factor / (corrected.sqrt() + group["eps"])).to(parameter.device)
        else:
            factor = 0.0 if "betas" in group else factor  # Adam never moved it
            preconditioner[name] = torch.full_like(parameter, factor, dtype=torch.float32)
        decay[name] = float(group.get("weight_decay") or 0.0) * factor
    return Optimizer(rate, preconditioner, decay, "exp_avg_sq" in kinds)


# Steps


@dataclass(frozen=True)
class Segment:
    """Steps `start` to `stop` (excluded), which a checkpoint stands for.

    Attributes:
        rates (`[steps]`): η_t times the share of the gradient that clipping left.
    """

    start: int
    stop: int
    rates: np.ndarray


def segments_of(
    checkpoints: Sequence[Checkpoint], rates: Sequence[float | None], max_grad_norm: float
) -> list[Segment]:
    """Every checkpoint stands for the steps that are nearer to it than to any other, from the run's first to the last checkpoint.

    Learning rates and gradient norms are those that were logged, and in between on straight lines.

    Args:
        rates: by checkpoint, of its optimiser.
        max_grad_norm (`float`): gradients were clipped to; 0 where they were not.

    Raises:
        ValueError: neither log nor optimiser tells of learning rates.
    """
    last = checkpoints[-1]
    known = {
        entry["step"]: entry["learning_rate"] for entry in last.logged if "learning_rate" in entry and "step" in entry
    }
    known |= {
        one.step: rate
        for one, rate in zip(checkpoints, rates, strict=True)
        if rate is not None and one.step not in known
    }
    if not known:
        raise ValueError(
            f"checkpoints: neither {STATE} nor {OPTIMIZER} of {str(last.folder)!r} tells of learning rates; pass the model alone"
        )
    norms = {entry["step"]: entry["grad_norm"] for entry in last.logged if "grad_norm" in entry and "step" in entry}
    steps = np.arange(last.step)
    each = _on_lines(steps + 1, known)
    if max_grad_norm and norms:
        each = each * np.minimum(1, max_grad_norm / (_on_lines(steps + 1, norms) + 1e-6))
    ends = [one.step for one in checkpoints]
    bounds = [0, *((before + after) // 2 for before, after in zip(ends, ends[1:], strict=False)), last.step]
    return [Segment(a, b, each[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def _on_lines(steps: np.ndarray, values: dict[int, float]) -> np.ndarray:
    places = sorted(values)
    return np.interp(steps, places, [float(values[place]) for place in places])
