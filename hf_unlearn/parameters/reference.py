"""The reference point θ* and the averages of weights: states of a model by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import load_tensors, save_tensors
from ..modes import in_eval_mode


Parameters = Mapping[str, Tensor]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `model` that training changes, by name; tied parameters appear once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def at_least_single(tensors: Sequence[Tensor]) -> torch.dtype:
    """The precision to sum in: fp32, or fp64 where the tensors are."""
    return torch.promote_types(tensors[0].dtype, torch.float32)


@dataclass(frozen=True)
class ReferencePoint:
    """A model's state at one moment (θ* in the papers): trainable parameters and buffers, by name.

    Frozen parameters are not copied: they cannot move. So a LoRA reference costs the size of the adapter, and a full
    one costs the model once, which an anchor then shares.

    Attributes:
        parameters (`dict[str, Tensor]`): trainable parameters, detached copies.
        buffers (`dict[str, Tensor]`): buffers, such as BatchNorm statistics, detached copies.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def capture(cls, model: nn.Module) -> ReferencePoint:
        """Copy the state of `model` as it is now."""
        return cls(
            {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()},
            {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
        )

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Write this state back into `model`, in place.

        Raises:
            ValueError: the model does not have the same trainable parameters.
        """
        parameters, buffers = trainable_parameters(model), dict(model.named_buffers())
        if parameters.keys() != self.parameters.keys():
            odd = sorted(parameters.keys() ^ self.parameters.keys())
            raise ValueError(
                f"model: its trainable parameters are not those of the saved state (first difference: {odd[0]})"
            )
        for name, value in self.parameters.items():
            parameters[name].copy_(value)
        for name, value in self.buffers.items():
            buffers[name].copy_(value)

    @torch.no_grad()
    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run `model` as it was at this point: in eval mode, without gradients, changing nothing in it."""
        with in_eval_mode(model):
            return torch.func.functional_call(model, {**self.parameters, **self.buffers}, args, kwargs)

    def save(self, path: str | Path) -> None:
        """Write to one `.safetensors` file, complete or not at all."""
        tensors = {f"parameter/{k}": v.contiguous() for k, v in self.parameters.items()}
        tensors |= {f"buffer/{k}": v.contiguous() for k, v in self.buffers.items()}
        save_tensors(tensors, path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> ReferencePoint:
        """Read what [`~ReferencePoint.save`] wrote. On the CPU the file is mapped: it takes no memory of its own before it is used, and then
        such as the system can take back.

        Raises:
            ValueError: the file is missing or damaged.
        """
        parts: dict[str, dict[str, Tensor]] = {"parameter": {}, "buffer": {}}
        for key, value in load_tensors(path, device).items():
            kind, name = key.split("/", 1)
            parts[kind][name] = value
        return cls(parts["parameter"], parts["buffer"])


def average_(average: Parameters, now: Parameters, decay: float, step: int) -> None:
    """One step of an exponential moving average, in place.

    The decay begins low, min(`decay`, (1 + `step`)/(10 + `step`)), so that the average forgets where it began.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.values()), [now[name].detach() for name in average], weight)
