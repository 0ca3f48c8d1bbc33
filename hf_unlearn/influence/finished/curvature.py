r"""Curvature of a training loss by Kronecker factors with corrected eigenvalues (EK-FAC).

The Fisher information of a layer, which is the Gauss–Newton matrix of a cross-entropy, is approximated in the eigenbasis of its two
factors (K-FAC, arXiv 1503.05671), where its diagonal is measured (EK-FAC, arXiv 1806.03884):

$$ F = E\big[\operatorname{vec}(r c^\top)\operatorname{vec}(r c^\top)^\top\big] \approx Q\,\Lambda\,Q^\top, \qquad
   Q = Q_R \otimes Q_C, \quad Q_R \text{ of } E[r r^\top], \; Q_C \text{ of } E[c c^\top], \qquad
   \Lambda = E\big[(Q_R^\top\, h\, Q_C)^2\big], $$

h the gradient of one example with labels that are drawn from the model. Between layers it is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from .blocks import Block, Gradients, Layer, blocks_of


CHUNK_ELEMENTS = 2**24  # of gradients that are formed at once, 64 MiB
LARGEST = 8192  # side of a factor: its eigenvectors take minutes beyond
EXACT = 2048  # sides up to this are decomposed in double precision


@dataclass(eq=False)
class Factored:
    """What is known of one block.

    Attributes:
        block (`Block`): its parameters.
        rows, columns (`[groups, rows, rows]`, `[groups, columns, columns]`): Σ r rᵀ and Σ c cᵀ, then their eigenvectors.
        eigenvalues (`[groups, rows, columns]`): Λ.
    """

    block: Block
    rows: Tensor
    columns: Tensor
    eigenvalues: Tensor

    def rotated(self, packed: Tensor) -> Tensor:
        return self.rows.mT @ packed.to(self.rows) @ self.columns

    def rotated_back(self, packed: Tensor) -> Tensor:
        return self.rows @ packed @ self.columns.mT


@dataclass(eq=False)
class Curvature:
    """Collects factors, then eigenvalues, from backward passes; see the module.

    Each `see_…` is a visitor of [`GhostRecorder.start`][hf_unlearn.influence.in_run.ghost.GhostRecorder.start].

    Attributes:
        blocks (`dict[str, Factored]`): by name.
        predictions (`float`): that the passes which `see_eigenvalues` summed over were of.
    """

    blocks: dict[str, Factored] = field(default_factory=dict)
    predictions: float = 0.0

    def see_factors(self, layer: Layer, found: Mapping[str, Gradients], *, inputs: bool = True) -> None:
        """Of a batch with other labels, what its inputs add is known already: `inputs=False`."""
        known = None if inputs else int(not isinstance(layer.module, Conv1D))
        for name, block, rows, columns in blocks_of(layer, found):
            if name not in self.blocks:
                zeros = [
                    rows.new_zeros(block.groups, side, side, dtype=_wide(rows)) for side in (block.rows, block.columns)
                ]
                self.blocks[name] = Factored(block, *zeros, rows.new_zeros(0))
            mine = self.blocks[name]
            counted = (rows != 0).any(-1, keepdim=True) & (columns != 0).any(-1, keepdim=True)  # padding does not
            for place, (total, side) in enumerate(((mine.rows, rows), (mine.columns, columns))):
                if place != known:
                    one = (side * counted).transpose(0, 1).flatten(1, 2).to(total.dtype)
                    total += one.mT @ one

    def decompose(self) -> None:
        """Factors become their eigenvectors."""
        for mine in self.blocks.values():
            mine.rows, mine.columns = (_eigenvectors(total) for total in (mine.rows, mine.columns))
            mine.eigenvalues = mine.rows.new_zeros(mine.block.groups, mine.block.rows, mine.block.columns)

    def see_eigenvalues(self, layer: Layer, found: Mapping[str, Gradients]) -> None:
        for mine, h in self._formed(layer, found):
            mine.eigenvalues += h.square().sum(0)

    def close(self) -> None:
        """Sums become means."""
        for mine in self.blocks.values():
            mine.eigenvalues /= self.predictions

    def _formed(self, layer: Layer, found: Mapping[str, Gradients]) -> Iterator[tuple[Factored, Tensor]]:
        """Gradients of some examples at a time in the eigenbasis, `[some, groups, rows, columns]`."""
        for name, block, rows, columns in blocks_of(layer, found):
            mine = self.blocks[name]
            step = max(1, CHUNK_ELEMENTS // (block.groups * block.rows * block.columns))
            for r, c in zip(rows.split(step), columns.split(step), strict=True):
                r, c = r.to(mine.rows), c.to(mine.columns)
                positions, (a, b) = r.shape[2], (block.rows, block.columns)
                if positions * (a * a + b * b) > a * b * (a + b):  # operations: formed, then rotated; or the other way
                    yield mine, mine.rotated(r.mT @ c)
                else:
                    yield mine, (r @ mine.rows).mT @ (c @ mine.columns)

    def scores(self, layer: Layer, found: Mapping[str, Gradients], weights: Mapping[str, Tensor]) -> Tensor:
        """Σ_j h_ij² w_j of a batch's examples, in a layer: `[batch]`; `weights` by block, in the eigenbasis."""
        names = [name for name, *_ in blocks_of(layer, found)]
        parts: dict[int, list[Tensor]] = {}
        of = {id(self.blocks[name]): name for name in names}
        for mine, h in self._formed(layer, found):
            parts.setdefault(id(mine), []).append((h.square() * weights[of[id(mine)]]).flatten(1).sum(1))
        return sum(torch.cat(some) for some in parts.values())

    def apply(self, vectors: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Q f(Λ) Qᵀ v of vectors by parameter, `[C, *shape]` each."""
        result: dict[str, Tensor] = {}
        like = {name: value[0] for name, value in vectors.items()}
        for mine in self.blocks.values():
            rotated = mine.rotated(mine.block.pack(vectors)) * function(mine.eigenvalues)
            result |= mine.block.unpack(mine.rotated_back(rotated), like)
        return result


def damped(share: float) -> Callable[[Tensor], Tensor]:
    """1/(Λ + δ) with δ a share of the block's mean eigenvalue."""

    def inverse(eigenvalues: Tensor) -> Tensor:
        return 1 / (eigenvalues + share * eigenvalues.mean()).clamp(min=torch.finfo(eigenvalues.dtype).tiny)

    return inverse


def too_large(block: Block) -> bool:
    return max(block.rows, block.columns) > LARGEST


def _eigenvectors(total: Tensor) -> Tensor:
    exact = total.double() if total.shape[-1] <= EXACT else total
    return torch.linalg.eigh(exact).eigenvectors.to(total.dtype)


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)
