r"""Gradients made small: each side of a layer's gradient is projected for itself, so that no gradient is ever formed.

$$ \phi(h_i) = \sum_t (M_R\, r_{it})\,(M_C\, c_{it})^\top, \qquad M_R = \Pi_R\, D_R\, Q_R^\top, \quad M_C = \Pi_C\, D_C\, Q_C^\top, $$

Q the eigenvectors of the layer's Kronecker factors, D_R ⊗ D_C the product of sides that is nearest to (Λ + δ)^{−1/2}, and Π what makes a
side short: it keeps the directions with the largest sums of Λ/(Λ + δ), as little is left of others in a score; or it is random with
orthonormal rows of length √(side/size), so that E[ΠᵀΠ] = 1. (Projections of the two sides are LoGra's, arXiv 2405.13954; TRAK's, arXiv
2303.14186, is of the whole gradient.) A query's vector is multiplied by what D lacks of 1/(Λ + δ) before it is projected, so that a
product of the two is exactly what EK-FAC says where nothing is projected, and so on average where Π is random.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Block, Gradients, Layer, blocks_of
from .curvature import Curvature, Factored, damped


@dataclass(frozen=True, eq=False)
class Side:
    """One side of a block's gradients: Qᵀ `[groups, side, side]`, D `[groups, side]` and Π `[groups, size, side]`."""

    eigenvectors: Tensor
    scale: Tensor
    few: Tensor

    @property
    def whole(self) -> Tensor:
        """M, `[groups, size, side]`."""
        return self.few @ (self.scale[..., None] * self.eigenvectors)


@dataclass(eq=False)
class Projections:
    """Of every block.

    Attributes:
        blocks (`dict[str, Block]`): by name, in the order that a row has them.
        tensors (`dict[str, Tensor]`): what they are made of, as it is kept on disk.
    """

    blocks: dict[str, Block]
    tensors: dict[str, Tensor]

    def __post_init__(self):
        self._sides = {
            name: tuple(
                Side(*(self.tensors[f"{name}/{which}.{part}"] for part in ("eigenvectors", "scale", "few")))
                for which in ("rows", "columns")
            )
            for name in self.blocks
        }
        self._whole = {name: tuple(side.whole for side in sides) for name, sides in self._sides.items()}

    @classmethod
    def of(
        cls, curvature: Curvature, *, damping: float, size: int | None, seed: int, random: bool = False
    ) -> Projections:
        """Of a curvature; each side of every layer to `size` numbers, None leaves them as they are. With `random` Π is random."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, mine in curvature.blocks.items():
            inverse = damped(damping)(mine.eigenvalues)
            rows, columns = _sides_of(inverse.sqrt())
            counts = (mine.eigenvalues * inverse).double()  # Λ/(Λ + δ): how much of a direction is left of a score
            for which, vectors, scale, axis in (
                ("rows", mine.rows, rows, 2), ("columns", mine.columns, columns, 1),
            ):  # fmt: skip
                few = [_few(one, size, generator if random else None) for one in counts.sum(axis)]
                parts = {"eigenvectors": vectors.mT.contiguous(), "scale": scale, "few": torch.stack(few).to(scale)}
                tensors |= {f"{name}/{which}.{part}": value for part, value in parts.items()}
            tensors[f"{name}/inverse"] = inverse
        return cls({name: mine.block for name, mine in curvature.blocks.items()}, tensors)

    @property
    def widths(self) -> dict[str, int]:
        """Numbers that each block has in a row."""
        return {
            name: rows.few.shape[0] * rows.few.shape[1] * columns.few.shape[1]
            for name, (rows, columns) in self._sides.items()
        }

    @property
    def width(self) -> int:
        return sum(self.widths.values())

    def see(self, layer: Layer, found: Mapping[str, Gradients], rows: dict[str, Tensor]) -> None:
        """A visitor that adds φ of a layer to `rows`, `[batch, width]` by block."""
        for name, _, r, c in blocks_of(layer, found):
            left, right = self._whole[name]
            part = ((r.to(left) @ left.mT).mT @ (c.to(right) @ right.mT)).flatten(1)
            rows[name] = rows[name] + part if name in rows else part

    def query(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """What products with φ are taken with, of the gradients of targets by parameter: `[C, width]`."""
        parts = []
        for name, block in self.blocks.items():
            rows, columns = self._sides[name]
            mine = Factored(block, rows.eigenvectors.mT, columns.eigenvectors.mT, self.tensors[f"{name}/inverse"])
            rest = mine.eigenvalues / (rows.scale[..., None] * columns.scale[..., None, :])
            packed = mine.rotated(block.pack(vectors)) * rest
            parts.append((rows.few @ packed @ columns.few.mT).flatten(1))
        return torch.cat(parts, dim=1)


def _sides_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """u `[groups, rows]` and v `[groups, columns]` with u vᵀ nearest to `[groups, rows, columns]`, by logarithms."""
    logarithm = values.double().log()
    u = logarithm.mean(2)
    v = (logarithm - u[..., None]).mean(1)
    return u.exp().to(values), v.exp().to(values)


def _few(counts: Tensor, size: int | None, generator: torch.Generator | None) -> Tensor:
    """Π, `[size, side]`: of the directions that count most, or random where there is a generator."""
    side = len(counts)
    if size is None or size >= side:
        return torch.eye(side, dtype=torch.float64, device=counts.device)
    if generator is None:
        return torch.eye(side, dtype=torch.float64, device=counts.device)[counts.topk(size).indices]
    found = torch.randn(side, size, generator=generator, dtype=torch.float64)
    return (torch.linalg.qr(found).Q.T * math.sqrt(side / size)).to(counts)
