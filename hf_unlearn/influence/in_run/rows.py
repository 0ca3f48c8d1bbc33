"""Whose the rows of a layer's outputs are: learned by looking, as sizes do not tell it.

An axis as long as the batch may hold positions (a table that all examples share, a sequence-first model). But the gradient of one
example's loss reaches that example's rows and no others, exactly, and what it shares with another example is reached from both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


SHARED = "it computes what all examples share"


@dataclass(frozen=True)
class Rows:
    """Where examples are in what a layer takes and gives.

    Attributes:
        axis (`int`): the one that they are on, alone or with positions.
        interleaved (`bool`): with positions outside, `[positions · batch]`, and not `[batch · positions]`.
    """

    axis: int = 0
    interleaved: bool = False

    def examples_first(self, value: Tensor, batch: int) -> Tensor:
        """`[batch · positions, …]`, each example's rows together."""
        value = value.movedim(self.axis, 0)
        return value.unflatten(0, (-1, batch)).transpose(0, 1).flatten(0, 1) if self.interleaved else value


FIRST = Rows()


@dataclass(frozen=True)
class Reached:
    """What the gradient of one example's loss reaches in a layer's output: of each axis its size and the indices."""

    example: int
    axes: tuple[tuple[int, Tensor], ...]

    @classmethod
    def by(cls, y: Tensor, example: int, axes: int) -> Reached:
        """The first `axes` axes of a gradient."""
        nonzero = y != 0
        found = []
        for axis in range(axes):
            others = [other for other in range(y.dim()) if other != axis]
            along = nonzero.any(others) if others else nonzero
            found.append((y.shape[axis], along.nonzero().squeeze(1)))
        return cls(example, tuple(found))


def rows_of(looks: Sequence[Reached], batch: int) -> Rows | str | None:
    """What looks of different examples at one call of a layer agree with; None where no gradient arrives, and else why there is
    nothing. The first axis is preferred.
    """
    seen = [look for look in looks if not look.axes or look.axes[0][1].numel()]
    if not seen:
        return None
    for axis in range(len(seen[0].axes)):
        for interleaved in (False, True):
            if all(_is_own(*look.axes[axis], look.example, batch, interleaved) for look in seen):
                return Rows(axis, interleaved)
    return SHARED


def _is_own(size: int, indices: Tensor, example: int, batch: int, interleaved: bool) -> bool:
    if size % batch:
        return False
    owner = indices % batch if interleaved else indices // (size // batch)
    return bool(torch.all(owner == example))
