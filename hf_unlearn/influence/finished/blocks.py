"""Blocks of parameters that share Kronecker factors, and what a backward pass gives of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Gradients(Protocol):
    """Of one parameter, by example: h_i = Σ_t r_t c_tᵀ."""

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """r and c, `[batch, groups, positions, rows]` and `[batch, groups, positions, columns]`; None where there are none."""


class Layer(Protocol):
    """A layer that is looked at, and its parameters' full names by their local ones."""

    name: str
    module: nn.Module
    names: dict[str, str]


@dataclass(frozen=True)
class Block:
    """A weight as a matrix (of each group, where a convolution has several), with its bias as one column more (of a `Conv1D` one row).

    A vector, as the scale of a norm, is a matrix of one column.

    Attributes:
        weight (`str`), bias (`str`, *optional*): full names.
        groups, rows, columns (`int`): of the matrices, bias included.
        along (`int`): the axis that the bias is appended to, -1 or -2.
    """

    weight: str
    bias: str | None
    groups: int
    rows: int
    columns: int
    along: int = -1

    @property
    def names(self) -> list[str]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def pack(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """`[C, groups, rows, columns]` of what has the parameters' shapes after its first axis."""
        weight = gradients[self.weight]
        rows, columns = self.rows, self.columns
        if self.bias is not None:
            rows, columns = (rows, columns - 1) if self.along == -1 else (rows - 1, columns)
        packed = weight.reshape(len(weight), self.groups, rows, columns)
        if self.bias is None:
            return packed
        bias = gradients[self.bias].reshape(len(weight), self.groups, -1).unsqueeze(self.along)
        return torch.cat([packed, bias], dim=self.along)

    def unpack(self, packed: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `pack`; `like` has tensors of the parameters' shapes."""
        parts = [packed]
        if self.bias is not None:
            parts = packed.split([packed.shape[self.along] - 1, 1], dim=self.along)
        return {n: part.reshape(len(packed), *like[n].shape) for n, part in zip(self.names, parts, strict=True)}


def blocks_of(layer: Layer, found: Mapping[str, Gradients]) -> Iterator[tuple[str, Block, Tensor, Tensor]]:
    """The blocks of a layer by name, with r `[batch, groups, positions, rows]` and c `[batch, groups, positions, columns]` of the
    batch. Parameters without factors are in none.
    """
    factors = {local: gradients.factors() for local, gradients in found.items()}
    weight, bias = factors.get("weight"), factors.get("bias")
    if weight is not None and bias is not None and weight[1].shape[-1] > 1:
        (rows, columns), along = weight, -2 if isinstance(layer.module, Conv1D) else -1
        if along == -1:
            columns = torch.cat([columns, torch.ones_like(columns[..., :1])], dim=-1)
        else:
            rows = torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
        yield layer.name, _block(layer.names["weight"], layer.names["bias"], rows, columns, along), rows, columns
        return
    for local, pair in factors.items():
        if pair is not None:
            yield layer.names[local], _block(layer.names[local], None, *pair), *pair


def _block(weight: str, bias: str | None, rows: Tensor, columns: Tensor, along: int = -1) -> Block:
    return Block(weight, bias, rows.shape[1], rows.shape[-1], columns.shape[-1], along)
