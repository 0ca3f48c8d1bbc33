"""Taps behind layers: what is kept of a layer's call until the gradient of what it gave arrives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from .recomputed import Call
from .rows import Reached
from .survey import Layer


@dataclass(eq=False)
class Look:
    """What passes of single examples find out.

    Attributes:
        example (`int`): whose loss is backwarded now.
        reached (`dict`): by layer and number of its call.
        failed (`set`): layers that cannot run again.
        loose (`bool`): autocast rounds.
    """

    example: int = 0
    reached: dict[tuple[str, int], list[Reached]] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    loose: bool = False


@dataclass(eq=False)
class Pass:
    """What lies between one start and its stop: a graph that was built in another is not recorded."""

    batch_size: int
    look: Look | None = None
    by_name: dict[str, float] | None = None  # dots of each parameter, where they are asked for
    calls: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, eq=False)
class Seen:
    """One call of a layer; the tensors that it was given are with the tap's autograd node."""

    layer: Layer
    current: Pass
    number: int
    outputs: int
    places: list[int]  # of the tapped outputs
    examples: int | None  # a row of embeddings that all of them share is expanded to so many
    plain: list[tuple[Any] | None]  # arguments that are no tensors
    structure: TreeSpec | None
    autocast: torch.dtype | None

    def call(self, kept: Sequence[Tensor]) -> Call:
        tensors = iter(kept)
        arguments = [next(tensors) if plain is None else plain[0] for plain in self.plain]
        rows = next((len(one) for one in kept if one.dim()), 0)
        return Call(arguments, self.structure, rows, self.autocast)


class Tap(torch.autograd.Function):
    """Identity on a layer's outputs that remembers the layer's inputs and, in the backward pass, hands both over.

    `save_for_backward`, and not the hook's closure, keeps x: so activation checkpointing can drop and recompute it, and
    a recomputation, which runs the hooks again, leaves no second record. A single row of embeddings that all examples
    share is expanded, so that every example's part of the gradient arrives before they are summed, as broadcasting would.
    """

    @staticmethod
    def forward(ctx, recorder, seen, *tensors):
        count = len(seen.places)
        ctx.save_for_backward(*tensors[count:])
        ctx.recorder, ctx.seen, ctx.kept = recorder, seen, len(tensors) - count
        outputs = tensors[:count]
        if seen.examples is not None:
            outputs = [outputs[0].expand(seen.examples, *outputs[0].shape[1:])]
        # An alias with the output's version counter, but not a view: views from a Function forbid ReLU(inplace=True)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx, *ys):
        if ctx.recorder._pass is ctx.seen.current:
            ctx.recorder._record(ctx.seen, ctx.saved_tensors, ys)
        if ctx.seen.examples is not None:
            ys = [ys[0].sum(0, keepdim=True)]
        return (None, None, *ys, *[None] * ctx.kept)
