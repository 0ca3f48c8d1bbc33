"""The trade-off curve of two laws, and its Gaussian form Gμ (f-differential privacy)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import erfcx, ndtr, ndtri


Array = NDArray[np.float64]


TOLERANCE = 1e-9  # rounding allowed in a curve's convexity


@dataclass(frozen=True, eq=False)
class TradeOff:
    r"""The trade-off curve of two laws: the least type-II error that a type-I error allows,

    $$ T(P, Q)(\alpha) = \inf_\phi \{\, 1 - E_Q\,\phi \;:\; E_P\,\phi \le \alpha \,\}. $$

    Straight between its points. T(α) = 1 − α: the laws are the same; T = 0: a test never errs.

    Args:
        alpha (array): `[k]`, type-I errors, from 0 to 1, not decreasing. Two first points at 0 make a vertical step.
        beta (array): `[k]`, type-II errors, from 1 to 0, not increasing, convex in `alpha`.

    Raises:
        ValueError: the points are not such a curve.
    """

    alpha: Array
    beta: Array

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            points = np.array(getattr(self, name), dtype=np.float64)
            points.flags.writeable = False
            object.__setattr__(self, name, points)
        alpha, beta = self.alpha, self.beta
        if alpha.ndim != 1 or alpha.shape != beta.shape or len(alpha) < 2:
            raise ValueError(f"alpha, beta: shapes {alpha.shape}, {beta.shape}; must be one [k] with k >= 2")
        if (alpha[0], beta[0], alpha[-1], beta[-1]) != (0.0, 1.0, 1.0, 0.0):
            raise ValueError(
                f"alpha, beta: go from ({alpha[0]:g}, {beta[0]:g}) to ({alpha[-1]:g}, {beta[-1]:g}); "
                "must go from (0, 1) to (1, 0)"
            )
        right, down = np.diff(alpha), np.diff(beta)
        turns = right[:-1] * down[1:] - down[:-1] * right[1:]
        # Written so that NaN fails too.
        if not ((right >= 0).all() and (down <= 0).all() and (turns >= -TOLERANCE).all()):
            raise ValueError(
                "alpha, beta: not a convex curve that falls from (0, 1) to (1, 0); see TradeOff.from_samples"
            )

    @classmethod
    def from_samples(cls, p: ArrayLike, q: ArrayLike) -> TradeOff:
        """The empirical curve of all threshold tests, "above τ" and "below τ", and of their random mixtures.

        Mixtures fill in the lower convex envelope. The threshold is chosen on the sample that judges it, so the curve
        lies below the true one: a little for large samples, a lot for small ones. Where the likelihood ratio is not
        monotone (two laws of different spread) better tests than thresholds exist and are not looked for.

        Args:
            p, q (array of `float`): `[n]` and `[m]` values under the two laws. Ties are never split.

        Raises:
            ValueError: an empty sample, or one that is not one-dimensional and finite.
        """
        p, q = _observations("p", p, at_least=1), _observations("q", q, at_least=1)
        n, m = len(p), len(q)
        codes, n_values = _rank(p, q)
        below_p, below_q = (_count_up_to(sample[None], n_values)[0] for sample in codes)
        # Whole counts, so that the envelope is exact: errors on P out of n, on Q out of m.
        above, below = (n - below_p, below_q), (below_p, m - below_q)
        errors_p, errors_q = (np.concatenate(both) for both in zip(above, below, strict=True))
        order = np.lexsort((errors_q, errors_p))
        errors_p, best = np.unique(errors_p[order], return_index=True)
        envelope = _lower_envelope(errors_p.tolist(), errors_q[order][best].tolist())
        if envelope[0] != (0, m):
            envelope.insert(0, (0, m))
        alpha, beta = np.array(envelope).T
        return cls(alpha / n, beta / m)

    @classmethod
    def gaussian(cls, mu: float, n_points: int = 401) -> TradeOff:
        """`gaussian_tradeoff(mu, ·)` at `n_points` (at least 3) points, evenly spaced in the test's threshold.

        Chords lie above a convex curve: with 401 points by less than 3e-4 for |μ| up to 6.
        """
        if n_points < 3:
            raise ValueError(f"n_points={n_points!r}: must be at least 3")
        if not np.isfinite(mu):
            raise ValueError(f"mu={mu!r}: must be finite")
        threshold = np.linspace(-6.0, abs(mu) + 6.0, n_points - 2)
        alpha, beta = ndtr(-threshold[::-1]), ndtr(threshold[::-1] - abs(mu))
        return cls(np.concatenate([[0.0], alpha, [1.0]]), np.concatenate([[1.0], beta, [0.0]]))

    def __call__(self, alpha: ArrayLike) -> Array:
        """T(α), for any shape of α in [0, 1].

        Raises:
            ValueError: an α outside [0, 1].
        """
        alpha = np.asarray(alpha, dtype=np.float64)
        _require_within("alpha", alpha, (alpha >= 0) & (alpha <= 1), "within [0, 1]")
        last_at_zero = np.searchsorted(self.alpha, 0.0, side="right") - 1  # the lower end of a vertical step
        return np.interp(alpha, self.alpha[last_at_zero:], self.beta[last_at_zero:])

    @property
    def auc(self) -> float:
        """Area under the best test's ROC curve: ½ when the laws are the same, 1 when they do not overlap."""
        return float(1.0 - np.diff(self.alpha) @ (self.beta[1:] + self.beta[:-1]) / 2)

    @property
    def total_variation(self) -> float:
        """The best test's advantage, max over α of 1 − α − T(α), in [0, 1]."""
        return float(np.max(1.0 - self.alpha - self.beta))


def gaussian_tradeoff(mu: ArrayLike, alpha: ArrayLike) -> Array:
    """T(N(0, 1), N(μ, 1))(α) = Φ(Φ⁻¹(1 − α) − |μ|), broadcast over finite `mu` and `alpha` in [0, 1].

    Raises:
        ValueError: an α outside [0, 1].
    """
    alpha = np.asarray(alpha, dtype=np.float64)
    _require_within("alpha", alpha, (alpha >= 0) & (alpha <= 1), "within [0, 1]")
    return ndtr(-ndtri(alpha) - np.abs(mu))


def delta_of(mu: ArrayLike, epsilon: ArrayLike) -> Array:
    r"""The δ at which a μ-Gaussian pair of laws is (ε, δ)-indistinguishable, broadcast over both:

    $$ \delta(\varepsilon) = \Phi(-\varepsilon/|\mu| + |\mu|/2) - e^\varepsilon\,\Phi(-\varepsilon/|\mu| - |\mu|/2) $$

    Nine relative digits for |μ| ≥ 1e-4, until the result itself underflows; e^ε may overflow. With an estimated μ this
    is a way of reading μ, not a privacy guarantee.

    Raises:
        ValueError: a negative `epsilon`.
    """
    mu, epsilon = np.abs(np.asarray(mu, dtype=np.float64)), np.asarray(epsilon, dtype=np.float64)
    _require_within("epsilon", epsilon, epsilon >= 0, "at least 0")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        near, far = epsilon / mu - mu / 2, epsilon / mu + mu / 2
        # e^ε φ(far) = φ(near), so e^ε Φ(−far) = φ(near)·Mills(far): nothing overflows, and where both terms are tail
        # probabilities they share the factor φ(near).
        density = np.exp(-(near**2) / 2) / math.sqrt(2 * math.pi)
        in_the_tail = density * (_mills_ratio(np.maximum(near, 0.0)) - _mills_ratio(far))
        delta = np.where(near > 0, in_the_tail, ndtr(-near) - density * _mills_ratio(far))
    return np.where(mu == 0, 0.0, np.clip(delta, 0.0, 1.0))[()]


def epsilon_of(mu: ArrayLike, delta: ArrayLike) -> Array:
    """The inverse of `delta_of`: the least ε ≥ 0 with δ(ε) ≤ `delta`, by bisection, broadcast over both.

    With an estimated μ this is a way of reading μ, not a privacy guarantee.

    Raises:
        ValueError: a `delta` outside (0, 1), where ε would be infinite or without meaning.
    """
    delta = np.asarray(delta, dtype=np.float64)
    _require_within("delta", delta, (delta > 0) & (delta < 1), "strictly between 0 and 1")
    mu, delta = np.broadcast_arrays(np.abs(np.asarray(mu, dtype=np.float64)), delta)
    low, high = np.zeros(mu.shape), np.maximum(mu * (mu / 2 - ndtri(delta)), 0.0)  # δ(ε) ≤ Φ(−ε/|μ| + |μ|/2)
    for _ in range(100):
        middle = (low + high) / 2
        above = delta_of(mu, middle) > delta
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(delta_of(mu, 0.0) <= delta, 0.0, high)[()]


def auc_of(mu: ArrayLike) -> Array:
    """AUC of the best test between two Gaussians |μ| standard deviations apart: Φ(|μ|/√2), in [½, 1]."""
    return ndtr(np.abs(mu) / math.sqrt(2))


def mu_of_auc(auc: ArrayLike) -> Array:
    """μ = √2 Φ⁻¹(AUC) with AUC = P(a loss without S > a loss with S); negative below ½, infinite at 0 and 1.

    Raises:
        ValueError: an AUC outside [0, 1].
    """
    auc = np.asarray(auc, dtype=np.float64)
    _require_within("auc", auc, (auc >= 0) & (auc <= 1), "within [0, 1]")
    return math.sqrt(2) * ndtri(auc)


def total_variation_of(mu: ArrayLike) -> Array:
    """Total variation distance of two Gaussians |μ| standard deviations apart: 2Φ(|μ|/2) − 1, in [0, 1]."""
    return 1.0 - 2.0 * ndtr(-np.abs(mu) / 2)


def compose(mus: ArrayLike, axis: int = -1) -> Array:
    """|μ| of several independent observations of one pair of settings, seen together: √(Σ μ²) along `axis`."""
    return np.sqrt(np.square(np.asarray(mus, dtype=np.float64)).sum(axis))


def _observations(name: str, values: ArrayLike, at_least: int) -> Array:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"{name}: shape {values.shape}; must be one-dimensional")
    if len(values) < at_least:
        raise ValueError(f"{name}: {len(values)} observations; needs at least {at_least}")
    _require_within(name, values, np.isfinite(values), "finite")
    return values


def _require_within(name: str, values: Array, inside: NDArray[np.bool_], what: str) -> None:
    if not np.all(inside):
        raise ValueError(f"{name}: holds {np.extract(~inside, values)[0]}; every value must be {what}")


def _mills_ratio(x: Array) -> Array:
    """Φ(−x) / φ(x)."""
    return math.sqrt(math.pi / 2) * erfcx(x / math.sqrt(2))


def _rank(x: Array, y: Array) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], int]:
    """Both samples with each value replaced by its place among the distinct values, and the number of those."""
    distinct, codes = np.unique(np.concatenate([x, y]), return_inverse=True)
    return (codes[: len(x)], codes[len(x) :]), len(distinct)


def _count_up_to(codes: NDArray[np.int64], n_values: int) -> NDArray[np.int64]:
    """`[r, n_values]`: in each row of `codes`, how many are at or below each value."""
    rows = np.arange(len(codes))[:, None] * n_values
    return np.bincount((codes + rows).ravel(), minlength=len(codes) * n_values).reshape(-1, n_values).cumsum(-1)


def _lower_envelope(x: list[int], y: list[int]) -> list[tuple[int, int]]:
    """Corners of the greatest convex function below the points, which are sorted by x and have one y each."""
    corners: list[tuple[int, int]] = []
    for point in zip(x, y, strict=True):
        while len(corners) > 1:
            (x0, y0), (x1, y1) = corners[-2:]
            if (x1 - x0) * (point[1] - y0) > (y1 - y0) * (point[0] - x0):
                break
            corners.pop()
        corners.append(point)
    return corners
