"""Parameters that several processes share among them (FSDP2): what a process holds, and what they hold together.

Such a parameter is a `DTensor`: its shape is the whole one, its memory this process's part. What is done to every element alike (anchors, averages, the
way back to a state) is done to the parts, without a word between processes; what is written to a file is whole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def is_shared(model: nn.Module) -> bool:
    """Whether processes share the parameters of a model, also while it has gathered them for a pass."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without it nobody has shared anything
    return fsdp is not None and isinstance(getattr(model, "_orig_mod", model), fsdp.FSDPModule)


def stock_class(model: nn.Module) -> type[nn.Module]:
    """The class that a model has where no processes share it: FSDP2 makes one of its own of it."""
    return type(model).__mro__[2] if is_shared(model) else type(model)


def without_a_part(model: nn.Module) -> list[str]:
    """Names of the parameters that processes share and of which some process has nothing: they have fewer rows than there are processes."""
    let_go(model)
    return [
        name
        for name, parameter in model.named_parameters()
        if isinstance(parameter, DTensor)
        and any(
            place.is_shard() and parameter.shape[place.dim] <= (parts - 1) * -(-parameter.shape[place.dim] // parts)
            for place, parts in zip(parameter.placements, parameter.device_mesh.shape, strict=True)
        )
    ]


def own(tensor: Tensor) -> Tensor:
    """The part that this process holds, not a copy; a plain tensor itself."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every process: they have to ask together."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a plain tensor that all hold, as `parameter` is shared among them; no communication.

    Args:
        value (`Tensor`): of the parameter's shape, on any device. One that is sharded stays as it is.
        parameter (`Tensor`): a plain one leaves `value` as it is.
    """
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    mesh = parameter.device_mesh
    shared = distribute_tensor(value, mesh, parameter.placements, src_data_rank=None)
    # A part may be a view of the whole, which would then stay in memory.
    return DTensor.from_local(
        shared.to_local().to(own(parameter).device, copy=True), mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def parts_of(
    held: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    whole: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Of what is `held`, this process's parts as `parameters` are shared; those in `shared` where it is the very tensors in `whole`, which are in memory once."""
    return {
        name: shared[name] if value is whole.get(name) else sharded_like(value, parameters[name])
        for name, value in held.items()
    }


def from_first(value: Tensor | None, parameter: DTensor) -> Tensor:
    """This process's part of a tensor that the first process alone holds.

    Args:
        value (`Tensor`, *optional*): on the first process.
        parameter (`DTensor`): of the same shape.
    """
    part = own(parameter)
    value = torch.empty(parameter.shape, dtype=part.dtype, device=part.device) if value is None else value.to(part)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements).to_local()


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack`; of tensors that are shared alike one that is shared as each of them."""
    first = tensors[0]
    if not isinstance(first, DTensor):
        return torch.stack([*tensors])
    shape = torch.Size([len(tensors), *first.shape])
    placements = [Shard(place.dim + 1) if place.is_shard() else place for place in first.placements]
    return DTensor.from_local(
        torch.stack([*map(own, tensors)]), first.device_mesh, placements, run_check=False,
        shape=shape, stride=torch.empty(shape, device="meta").stride(),
    )  # fmt: skip


def summed(value: Tensor, like: Tensor) -> Tensor:
    """Sum over the processes that share `like` of what each has of its own part."""
    if not isinstance(like, DTensor):
        return value
    placements = [Partial() if not placement.is_replicate() else Replicate() for placement in like.placements]
    return DTensor.from_local(value, like.device_mesh, placements, run_check=False).full_tensor()


@contextmanager
@torch.no_grad()
def in_place_of(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """`values` in the places of a model's sharded parameters and buffers for the time of a forward pass, and theirs in the places of `values`:
    no copy of either is made.

    Args:
        values (`Mapping[str, Tensor]`): by the names of parameters and buffers, shared among processes as those are.
    """
    let_go(model)
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    held = [held[name] for name in values]
    _swap(held, [*values.values()])
    try:
        yield
    finally:
        let_go(model)  # or the next pass would see what was gathered of `values`
        _swap(held, [*values.values()])


def let_go(model: nn.Module) -> None:
    """What FSDP2 has gathered of parameters, and keeps from a forward pass on, as it does of the root's: each process has its part again."""
    for module in model.modules() if is_shared(model) else ():
        if is_shared(module) and not hasattr(module, "_orig_mod"):
            module.reshard()


def _swap(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    for one, other in zip(map(own, first), map(own, second), strict=True):
        kept = one.clone()
        one.data.copy_(other)  # behind autograd's back: they are as they were when it asks for BatchNorm's statistics
        other.copy_(kept)


def parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name what this process holds of each."""
    return {name: own(tensor) for name, tensor in tensors.items()}
