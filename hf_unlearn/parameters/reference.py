"""The reference point θ* and the averages of weights: states of a model by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from ..files import load_tensors, save_tensors
from ..modes import in_eval_mode
from .sharding import from_first, in_place_of, is_sharded, let_go, own, parts, sharded_like, whole


Parameters = Mapping[str, Tensor]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `model` that training changes, by name; tied parameters appear once. Where processes share them, as they do."""
    let_go(model)
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
    def capture(cls, model: nn.Module, copy: bool = True) -> ReferencePoint:
        """Copy the state of `model` as it is now; or, to save it, look at it without a copy."""
        parameters = {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}
        point = cls(parameters, {name: buffer.detach() for name, buffer in model.named_buffers()})
        if not copy:
            return point
        return cls(
            *({name: value.clone() for name, value in part.items()} for part in (point.parameters, point.buffers))
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
            own(parameters[name]).copy_(own(sharded_like(value, parameters[name])))
        for name, value in self.buffers.items():
            buffers[name].copy_(value)

    @torch.no_grad()
    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run `model` as it was at this point: in eval mode, without gradients, changing nothing in it."""
        with in_eval_mode(model):
            if is_sharded(self.parameters.values()):
                with in_place_of(model, self.parameters | self.buffers):
                    return model(*args, **kwargs)
            return torch.func.functional_call(model, {**self.parameters, **self.buffers}, args, kwargs)

    def sharded_like(self, model: nn.Module) -> ReferencePoint:
        """The same point as a model holds its parameters that is shared among processes ([`hf_unlearn.parameters.sharding`])."""
        like = trainable_parameters(model)
        return type(self)({k: sharded_like(v, like[k]) for k, v in self.parameters.items()}, self.buffers)

    def save(self, path: str | Path, write: bool = True) -> None:
        """Write to one `.safetensors` file, complete or not at all. Processes that share parameters call it together, and one of them writes."""
        if not (write or is_sharded(self.parameters.values())):
            return
        tensors = {}
        for kind, values in (("parameter", self.parameters), ("buffer", self.buffers)):
            for name, value in values.items():
                gathered = whole(value)  # one at a time, so that all are together only where they are written
                if write:
                    tensors[f"{kind}/{name}"] = gathered.contiguous() if gathered is value else gathered.cpu()
        if write:
            save_tensors(tensors, path)

    @staticmethod
    @torch.no_grad()
    def restore_of_first(point: ReferencePoint | None, model: nn.Module) -> None:
        """Write the state that the first of several processes has into the model of each; the others pass None."""
        for name, parameter in trainable_parameters(model).items():
            value = None if point is None else point.parameters[name]
            if is_sharded([parameter]):
                own(parameter).copy_(from_first(value, parameter))
            else:
                parameter.copy_(broadcast(parameter.detach().clone() if value is None else value.to(parameter)))
        for name, buffer in model.named_buffers():
            buffer.copy_(broadcast(buffer.clone() if point is None else point.buffers[name].to(buffer)))

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
    torch._foreach_lerp_([*parts(average).values()], [own(now[name].detach()) for name in average], weight)
