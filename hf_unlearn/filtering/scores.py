r"""Scores of embeddings: the paper's directions, and a quadratic form of the marks against the unmarked pool.

Every score here is one of

$$ s(x) = b + \langle w, x - m\rangle + \sum_j q_j\, y_j^2 + \sum_r g_r\, \langle v_r, y\rangle^2, \qquad y = (x - m) W, $$

the linear ones without the squares. So many concepts are scored by a few matrix products, in fp32, linear ones alone by one: [`ScoreBank`].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


Array = NDArray[np.float64]
ROWS = 512  # scored at a time, so that what is between two products stays in the processor's cache


@dataclass(frozen=True, eq=False)
class Basis:
    """Coordinates in which the background is white up to the ridge: y = (x − m) W.

    Args:
        mean (array): m, `[d]`.
        whitening (array): W, `[d, k]`.
        variances (array): of the background along y, in [0, 1), `[k]`: below one where the ridge weighs.
    """

    mean: Array
    whitening: Array
    variances: Array


@dataclass(frozen=True, eq=False)
class Score:
    """One concept's score, as in the head of this file, in fp64.

    Args:
        name (`str`): one of [`SCORES`].
        mean, weight, bias: m `[d]`, w `[d]`, b.
        basis ([`Basis`], *optional*): W, of the quadratic form.
        squares (array, *optional*): q, `[k]`.
        directions (array, *optional*): v, `[k, r]`.
        gains (array, *optional*): g, `[r]`.
        shrinkage (`float`, *optional*): λ, how much of the covariance is not the marks' own.
    """

    name: str
    mean: Array
    weight: Array
    bias: float = 0.0
    basis: Basis | None = None
    squares: Array | None = None
    directions: Array | None = None
    gains: Array | None = None
    shrinkage: float | None = None

    def __call__(self, embeddings: Array) -> Array:
        """Scores `[n]` of embeddings `[n, d]`."""
        centred = np.asarray(embeddings, dtype=np.float64) - self.mean
        scores = self.bias + centred @ self.weight
        if self.basis is not None:
            y = centred @ self.basis.whitening
            scores = scores + y**2 @ self.squares + (y @ self.directions) ** 2 @ self.gains
        return scores


class ScoreBank(nn.Module):
    """Scores of many concepts at once, in fp32 whatever the module around it is cast to.

    Args:
        dimension (`int`): d, of an embedding.
        concepts (`int`): C.
        components (`int`): k, of the quadratic forms; 0 if there are none.
        directions (`int`): Σ r over the concepts.
    """

    def __init__(self, dimension: int, concepts: int, components: int = 0, directions: int = 0):
        super().__init__()
        shapes = {"mean": (dimension,), "weight": (dimension, concepts), "bias": (concepts,), "threshold": (concepts,)}
        if components:
            shapes |= {"whitening": (dimension, components), "squares": (components, concepts)}
            shapes |= {"directions": (components, directions), "gains": (directions, concepts)}
        # Parameters, since Transformers 5.23 cannot save a model that has buffers only.
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False))
        if not self.threshold.is_meta:
            self.threshold.fill_(-torch.inf)  # until somebody sets it, everything is blocked
        self.components = components

    @classmethod
    def of(cls, scores: Sequence[Score], thresholds: Sequence[float] | None = None) -> ScoreBank:
        """The bank of some scores; without thresholds it blocks everything."""
        forms = [score for score in scores if score.basis is not None]
        basis = forms[0].basis if forms else None
        if not all(np.array_equal(score.basis.whitening, basis.whitening) for score in forms):
            raise ValueError("scores: quadratic ones of one bank must have one background")
        mean = basis.mean if forms else np.zeros_like(scores[0].mean)
        dimension = len(mean)
        ranks = [0 if score.basis is None else len(score.gains) for score in scores]
        bank = cls(dimension, len(scores), basis.whitening.shape[1] if forms else 0, sum(ranks))
        # ⟨w, x − m'⟩ = ⟨w, x − m⟩ + ⟨w, m − m'⟩: all are brought to one origin.
        bias = [score.bias + score.weight @ (mean - score.mean) for score in scores]
        values = {
            "mean": mean,
            "weight": np.stack([score.weight for score in scores], 1),
            "bias": np.array(bias),
            "threshold": np.full(len(scores), -np.inf) if thresholds is None else np.array(thresholds),
        }
        if forms:
            values["whitening"] = basis.whitening
            none = np.zeros(basis.whitening.shape[1])
            values["squares"] = np.stack([none if s.squares is None else s.squares for s in scores], 1)
            values["directions"] = np.concatenate([score.directions for score in forms], 1)
            gains, begin = np.zeros((sum(ranks), len(scores))), 0
            for index, (score, rank) in enumerate(zip(scores, ranks, strict=True)):
                if rank:
                    gains[begin : begin + rank, index] = score.gains
                begin += rank
            values["gains"] = gains
        for name, value in values.items():
            getattr(bank, name).data = torch.from_numpy(np.ascontiguousarray(value)).float()
        return bank

    @property
    def dimension(self) -> int:
        return len(self.mean)

    @torch.no_grad()
    def forward(self, embeddings: Tensor) -> Tensor:
        """Scores `[n, concepts]`, fp32, of embeddings `[n, d]` of any floating dtype."""
        device = self.mean.device
        with torch.autocast(device.type, enabled=False):
            inside = self._inside() if self.components and len(embeddings) > ROWS else None
            rows = min(ROWS, len(embeddings))
            spaces = [self.mean.new_empty(rows, size) for size in self._sizes]
            return torch.cat(
                [self._scores(part.to(device).float(), inside, spaces) for part in embeddings.split(ROWS)]
            )

    @property
    def _sizes(self) -> tuple[int, ...]:
        return (self.dimension, self.components, len(self.gains)) if self.components else ()

    def _scores(self, embeddings: Tensor, inside: Tensor | None, spaces: Sequence[Tensor]) -> Tensor:
        if not self.components:
            return torch.addmm(self.bias - self.mean @ self.weight, embeddings, self.weight)
        centred, y, projected = (
            space[: len(embeddings)] for space in spaces
        )  # new memory would take a tenth of the time
        torch.sub(embeddings, self.mean, out=centred)
        torch.mm(centred, self.whitening, out=y)
        scores = torch.addmm(self.bias, centred, self.weight) if inside is None else torch.addmm(self.bias, y, inside)
        torch.mm(y, self.directions, out=projected)
        return scores.addmm_(projected.square_(), self.gains).addmm_(y.square_(), self.squares)

    def _inside(self) -> Tensor | None:
        """a with w = W a, `[k, concepts]`: ⟨w, x − m⟩ = ⟨a, y⟩ takes k products in place of d. None where some concept's w is not in the
        basis, but for rounding: what is left of it may change no score by more than 10⁻⁶ ‖w‖ ‖x − m‖.
        """
        inside = (self.whitening.T @ self.weight) / self.whitening.square().sum(0).unsqueeze(
            1
        )  # its columns are orthogonal
        left = (self.weight - self.whitening @ inside).norm(dim=0)
        return inside if bool((left <= 1e-6 * self.weight.norm(dim=0)).all()) else None

    def _apply(self, fn, recurse: bool = True):
        """Moves, and never casts: in 16 bits a score would be on the other side of its threshold."""
        return super()._apply(lambda tensor: _moved_only(fn, tensor), recurse)


def _moved_only(fn, tensor: Tensor) -> Tensor:
    if tensor.is_meta or not tensor.is_floating_point():
        return fn(tensor)
    moved = fn(tensor.new_empty(0))
    return fn(tensor) if moved.is_meta or moved.dtype == tensor.dtype else tensor.to(moved.device)
