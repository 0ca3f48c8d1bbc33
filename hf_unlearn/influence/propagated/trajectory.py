"""The run on disk: its batches, random states and coefficients, and states of the optimiser every so many steps.

`step-*.safetensors` hold all that a step needs to be taken again; `state-*.safetensors` hold θ and the optimiser's vectors before a
step. All of it is private.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...files import save_tensors, undamaged
from .optimizers import State, StepSettings


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of the run.

    Attributes:
        inputs (`dict`): what the model was given.
        random (`dict[str, Tensor]`): random states before it, by device.
        examples (`[batch]` int): which examples.
        weight (`[batch]`): predictions in each.
        coefficient (`[batch]`): q_i, so that the step descended Σ_i q_i ℓ_i.
        margin (`[batch]`): of each, see [`Observations`].
    """

    inputs: dict[str, Any]
    random: dict[str, Tensor]
    examples: Tensor
    weight: Tensor
    coefficient: Tensor
    margin: Tensor


def random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


class Trajectory:
    """Steps `start`, `start + 1`, … of a run.

    Args:
        folder: private; emptied by `clear`.
        start (`int`): first step that is kept.
        segment (`int`): a state is kept every so many steps; between them steps are computed again.
        steps (`int`, *optional*), limit (`int`, *optional*): of the run, and the bytes that all its batches may take.
    """

    def __init__(
        self, folder: str | Path, *, start: int, segment: int, steps: int | None = None, limit: int | None = None
    ):
        self.folder, self.start, self.segment = Path(folder), start, segment
        self.steps, self.limit = steps, limit
        self._micro: list[MicroBatch] = []

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def truncate(self, step: int) -> None:
        """Drop what is kept of `step` and later ones."""
        for file in self.folder.glob("*.safetensors"):
            if int(file.stem.split("-")[1]) >= step:
                file.unlink()

    # Writing

    def before(self, step: int, state: Callable[[], State]) -> None:
        """Called before the first forward pass of a step."""
        self._micro = []
        if step >= self.start and (step - self.start) % self.segment == 0:
            names = [str(index) for index in range(3)]
            save_tensors(dict(zip(names, state(), strict=False)), self._file("state", step))

    def add(self, step: int, micro: MicroBatch) -> None:
        if step >= self.start:
            self._micro.append(micro)

    def after(self, step: int, settings: StepSettings) -> None:
        """Called when the step has been taken.

        Raises:
            ValueError: at this size the batches of the run would not fit.
        """
        if step < self.start:
            return
        tensors, plain = {}, []
        for index, micro in enumerate(self._micro):
            parts = {f"input.{name}": value for name, value in micro.inputs.items() if isinstance(value, Tensor)}
            parts |= {f"random.{name}": value for name, value in micro.random.items()}
            parts |= {name: getattr(micro, name) for name in ("examples", "weight", "coefficient", "margin")}
            tensors |= {f"{index}.{name}": value.detach().contiguous() for name, value in parts.items()}
            plain.append({k: v for k, v in micro.inputs.items() if isinstance(v, bool | int | float | str)})
        if self.limit is not None:
            bytes_of_all = (self.steps - self.start) * sum(value.nbytes for value in tensors.values())
            if bytes_of_all > self.limit:
                raise ValueError(
                    f"trajectory_gigabytes: the run's batches would take {1e-9 * bytes_of_all:.0f} GB; raise it, set last_steps, or use "
                    "observation='in_run'"
                )
        about = {"count": settings.count, "groups": settings.groups, "max_norm": settings.max_norm, "plain": plain}
        save_tensors(tensors, self._file("step", step), metadata={"step": json.dumps(about)})
        self._micro = []

    # Reading

    def state(self, step: int, device: torch.device) -> State:
        path = self._file("state", step)
        with undamaged(path), safe_open(path, framework="pt", device=str(device)) as file:
            return tuple(file.get_tensor(name) for name in sorted(file.keys()))

    def step(self, step: int, device: torch.device) -> tuple[list[MicroBatch], StepSettings]:
        """All that a step was made of.

        Raises:
            ValueError: the step was not kept, or its file is damaged.
        """
        path = self._file("step", step)
        with undamaged(path), safe_open(path, framework="pt", device=str(device)) as file:
            about = json.loads(file.metadata()["step"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        batches = []
        for index, plain in enumerate(about["plain"]):
            own = {n.split(".", 1)[1]: v for n, v in tensors.items() if n.split(".", 1)[0] == str(index)}
            batches.append(
                MicroBatch(
                    inputs={n.removeprefix("input."): v for n, v in own.items() if n.startswith("input.")} | plain,
                    random={n.removeprefix("random."): v for n, v in own.items() if n.startswith("random.")},
                    **{name: own[name] for name in ("examples", "weight", "coefficient", "margin")},
                )
            )
        return batches, StepSettings(about["count"], about["groups"], about["max_norm"])

    def _file(self, kind: str, step: int) -> Path:
        return self.folder / f"{kind}-{step:08d}.safetensors"
