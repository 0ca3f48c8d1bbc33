"""The forms of a score: what sets marked samples apart from others, as directions and quadratic forms."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from sklearn.covariance import ledoit_wolf
from sklearn.svm import LinearSVC

from ...metrics.moments import Moments
from ..scores import Array, Basis, Score


ScoreName = Literal["quadratic", "lda", "linear_svc", "mean_difference"]


SCORES: tuple[str, ...] = get_args(ScoreName)


RIDGE = 0.1  # of the background's mean variance, added to every direction of both laws


def basis_of(background: Moments, components: int | None = None, ridge: float = RIDGE) -> Basis:
    """The `components` directions in which the background varies most (default: all).

    Raises:
        ValueError: nothing varies.
    """
    variances, directions = np.linalg.eigh(background.covariance)
    variances, directions = np.maximum(variances[::-1], 0), directions[:, ::-1]
    added = ridge * variances.mean()
    kept = slice(components)
    variances, directions = variances[kept], directions[:, kept]
    if not added > 0:
        raise ValueError("unmarked: all samples have the same embedding; nothing can be told from it")
    return Basis(background.mean, directions / np.sqrt(variances + added), variances / (variances + added))


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
