r"""Scores of embeddings: the paper's directions, and a quadratic form of the marks against the unmarked pool.

Every score here is one of

$$ s(x) = b + \langle w, x - m\rangle + \sum_j q_j\, y_j^2 + \sum_r g_r\, \langle v_r, y\rangle^2, \qquad y = (x - m) W, $$

the linear ones without the squares. So many concepts are scored by a few matrix products, in fp32: [`ScoreBank`].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from .fitting.background import Moments


Array = NDArray[np.float64]
ScoreName = Literal["quadratic", "lda", "linear_svc", "mean_difference"]
SCORES: tuple[str, ...] = get_args(ScoreName)
ROWS = 512  # scored at a time, so that what is between two products stays in the processor's cache
RIDGE = 0.1  # of the background's mean variance, added to every direction of both laws


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

    @classmethod
    def of(cls, background: Moments, components: int | None = None, ridge: float = RIDGE) -> Basis:
        """The `components` directions in which the background varies most (default: all)."""
        variances, directions = np.linalg.eigh(background.covariance)
        variances, directions = np.maximum(variances[::-1], 0), directions[:, ::-1]
        added = ridge * variances.mean()
        kept = slice(components)
        variances, directions = variances[kept], directions[:, kept]
        if not added > 0:
            raise ValueError("unmarked: all samples have the same embedding; nothing can be told from it")
        return cls(background.mean, directions / np.sqrt(variances + added), variances / (variances + added))


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


def mean_difference(undesired: Array, clean: Array) -> Score:
    """The paper's first form: ⟨x, v⟩ / ‖v‖ with v = mean(U) − mean(D)."""
    return _projection("mean_difference", undesired.mean(0) - clean.mean(0))


def linear_svc(undesired: Array, clean: Array, *, seed: int = 0) -> Score:
    """The paper's second form: ⟨x, v⟩ / ‖v‖ with v the weights of a linear support-vector classifier, C = 1."""
    rows = np.concatenate([undesired, clean])
    marks = np.arange(len(rows)) < len(undesired)
    classifier = LinearSVC(C=1.0, max_iter=20_000, random_state=seed).fit(rows, marks)
    return _projection("linear_svc", classifier.coef_[0])


def lda(undesired: Array, clean: Array) -> Score:
    """Fisher's direction, v = Σ⁻¹ (mean(U) − mean(D)), Σ being the Ledoit–Wolf covariance within the two kinds."""
    within = np.concatenate([undesired - undesired.mean(0), clean - clean.mean(0)])
    covariance, shrinkage = ledoit_wolf(within, assume_centered=True)
    direction = np.linalg.solve(covariance, undesired.mean(0) - clean.mean(0))
    return _projection("lda", direction, shrinkage=float(shrinkage))


def quadratic(undesired: Array, basis: Basis) -> Score:
    r"""Log-likelihood ratio of two Gaussians, that of the marks against that of the background:

    $$ s(x) = \tfrac12 \lVert y \rVert^2 - \tfrac12 (y - \mu)^\top C^{-1} (y - \mu), \qquad
       C = (1 - \lambda)\,\hat S + \lambda\,\Sigma_P + \rho I, $$

    with y the background's own coordinates ([`Basis`]), in which Σ_P + ρI is the identity. The covariance of a few marks says
    little, so it is drawn to the background's, as far as its own noise demands: λ is the estimate of Schäfer and Strimmer (2005)
    of what makes the expected squared error least, with Σ_P as target. λ = 1 is a linear score.

    Args:
        undesired (array): the marks, `[n, d]`, n ≥ 2.
        basis ([`Basis`]): of unmarked samples.
    """
    y = (undesired - basis.mean) @ basis.whitening
    n, mean = len(y), y.mean(0)
    centred = y - mean
    shrinkage = _shrinkage(centred, basis.variances)
    # C is diagonal but for the marks: C⁻¹ = D⁻¹ − B Bᵀ with B of at most n columns, in closed form (Woodbury).
    diagonal = shrinkage * basis.variances + (1 - basis.variances)
    root = np.sqrt(diagonal)[:, None]
    left, spread, _ = np.linalg.svd(np.sqrt((1 - shrinkage) / (n - 1)) * centred.T / root, full_matrices=False)
    columns = left * (spread / np.sqrt(1 + spread**2)) / root
    size = np.linalg.norm(columns, axis=0)
    columns = columns[:, size > 1e-9 * max(size.max(), 1e-300)]
    # ½ Σ (1 − 1/D) y² + Σ (y μ / D) − ½ Σ μ² / D + ½ |Bᵀ (y − μ)|², expanded around y = 0.
    shifted = columns.T @ mean
    linear = mean / diagonal - columns @ shifted
    return Score(
        "quadratic",
        basis.mean,
        basis.whitening @ linear,
        bias=float(-0.5 * (mean**2 / diagonal).sum() + 0.5 * (shifted**2).sum()),
        basis=basis,
        squares=0.5 * (1 - 1 / diagonal),
        directions=columns,
        gains=np.full(columns.shape[1], 0.5),
        shrinkage=shrinkage,
    )


def _shrinkage(centred: Array, target: Array) -> float:
    """λ* = Σ Var(S_ij) / Σ (S_ij − T_ij)², with T = diag(target); 1 where two marks are all there is."""
    n = len(centred)
    if n < 3:
        return 1.0
    products = centred.T @ centred / n
    squares = (centred**2).T @ centred**2 / n
    noise = (squares - products**2).sum() / (n - 1)
    distance = ((products - np.diag(target)) ** 2).sum()
    return float(min(1.0, noise / distance)) if distance > 0 else 1.0


def pseudo_clean(undesired: Array, unmarked: Array, *, factor: float, seed: int = 0) -> Array:
    """The paper's stand-in for clean marks, where only undesired ones are given: as many unmarked samples, drawn from those
    with p(x) < factor · min p over the marks, p being the projection on the mean mark.

    Args:
        factor (`float`): ½ for a generator's own latents, 1 for what an encoder gives.

    Raises:
        ValueError: no unmarked sample lies so low.
    """
    direction = undesired.mean(0)
    low = unmarked[unmarked @ direction < factor * (undesired @ direction).min()]
    if not len(low):
        raise ValueError(
            "unmarked: no sample lies far enough from the marks to stand in for a clean one; pass clean marks, or "
            "score='quadratic'"
        )
    return low[np.random.default_rng(seed).permutation(len(low))[: len(undesired)]].astype(np.float64)


def augmented(rows: Array, count: int, *, seed: int = 0) -> Array:
    """The paper's augmentation: `count` draws of a Gaussian with the mean and the variances of the rows."""
    draws = np.random.default_rng(seed).standard_normal((count, rows.shape[1]))
    return rows.mean(0) + draws * rows.std(0)


def _projection(name: str, direction: Array, shrinkage: float | None = None) -> Score:
    length = np.linalg.norm(direction)
    if not (np.isfinite(length) and length > 0):
        raise ValueError("undesired, clean: both kinds of marks are the same; nothing tells them apart")
    return Score(name, np.zeros(len(direction)), direction / length, shrinkage=shrinkage)


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
        mean = basis.mean if forms else scores[0].mean
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
            return torch.cat([self._scores(part.to(device).float()) for part in embeddings.split(ROWS)])

    def _scores(self, embeddings: Tensor) -> Tensor:
        centred = embeddings - self.mean
        scores = torch.addmm(self.bias, centred, self.weight)
        if self.components:
            y = centred @ self.whitening
            scores.addmm_((y @ self.directions).square_(), self.gains).addmm_(y.square_(), self.squares)
        return scores

    def _apply(self, fn, recurse: bool = True):
        """Moves, and never casts: in 16 bits a score would be on the other side of its threshold."""
        return super()._apply(lambda tensor: _moved_only(fn, tensor), recurse)


def _moved_only(fn, tensor: Tensor) -> Tensor:
    if tensor.is_meta or not tensor.is_floating_point():
        return fn(tensor)
    moved = fn(tensor.new_empty(0))
    return fn(tensor) if moved.is_meta or moved.dtype == tensor.dtype else tensor.to(moved.device)
