"""Two laws of one number, the trade-off curve between them, and μ: its closed forms, estimators and intervals.

P is the law of a statistic when the model trains with a set of examples S, Q its law without them. How well the best
test tells them apart is their trade-off curve; if both are Gaussian one number, μ, says it all (f-INE, arXiv
2510.10510; Gaussian differential privacy, arXiv 1905.02383). **A μ estimated from data depends on the data: it
describes what was observed and is no privacy guarantee.**
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import erfcx, gammaln, ndtr, ndtri


Array = NDArray[np.float64]
Statistic = Literal["loss", "gain"]
Method = Literal["accumulated", "composed", "max_abs", "gaussian", "auc"]

MIN_OBSERVATIONS = 4  # fewer leave a block bootstrap nothing to exchange
CHUNK_ELEMENTS = 2**22  # resampled values held at once, 32 MiB each
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


def accumulated_mu(delta: ArrayLike, sigma: ArrayLike, axis: int = -1) -> Array:
    """μ = Σ_t δ_t / √(Σ_t σ_t²): the shift of a sum of steps over the standard deviation of that sum.

    Exact when the steps' noises are independent. Without noise it is 0 where nothing moved, otherwise ±∞: two laws
    without spread are told apart with certainty.

    Args:
        delta (array of `float`): `[..., steps, ...]`; positive where S helps the target.
        sigma (array of `float`): ≥ 0, in the unit of `delta`, of a shape that broadcasts to its shape.
        axis (`int`): the steps.

    Raises:
        ValueError: a negative `sigma`.
    """
    delta, sigma = _steps(delta, sigma)
    return _ratio(delta.sum(axis), np.sqrt(np.square(sigma).sum(axis)))


def composed_mu(delta: ArrayLike, sigma: ArrayLike, axis: int = -1) -> Array:
    """μ = sign(Σ_t δ_t) √(Σ_t (δ_t / σ_t)²): the steps that moved (δ_t ≠ 0), composed as if all of them were released.

    What the composition theorem bounds. A sum of squares: noise alone makes it grow as the square root of the number
    of steps. Arguments and errors of `accumulated_mu`; ±∞ if a step without noise moved, 0 if the moves cancel.
    """
    delta, sigma = _steps(delta, sigma)
    sign = np.sign(delta.sum(axis))
    return np.where(sign == 0, 0.0, np.copysign(compose(_ratio(delta, sigma), axis), sign))[()]


@dataclass(frozen=True)
class MuEstimate:
    """An estimated μ with its interval. It depends on the data it was estimated from and is no privacy guarantee.

    Args:
        mu (`float`): in standard deviations; positive when S helps the target (without S its loss is higher).
        low, high (`float`): percentile interval, `low <= high`, signed as `mu` is. Covers the noise of the estimate,
            not a wrong σ.
        confidence (`float`): nominal coverage, in (0, 1).
        n_with, n_without (`int`): observations with and without S.
        method (`str`): the estimator's name in `estimate_mu`.
    """

    mu: float
    low: float
    high: float
    confidence: float
    n_with: int
    n_without: int
    method: Method

    @property
    def n_observations(self) -> int:
        """The smaller of `n_with` and `n_without`."""
        return min(self.n_with, self.n_without)


def estimate_mu(
    with_s: ArrayLike,
    without_s: ArrayLike,
    *,
    statistic: Statistic,
    method: Method = "accumulated",
    sigma: ArrayLike | None = None,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    block_length: int | None = None,
    seed: int | np.random.Generator = 0,
) -> MuEstimate:
    r"""μ of a set of examples S from observations with and without it, positive when **S helps** the target.

    With x the observations with S and y those without, as losses (gains are negated):

    - `"accumulated"`: $\sum_t \delta_t / \sqrt{\sum_t \sigma_t^2}$ with δ_t = y_t − x_t, see `accumulated_mu`.
    - `"composed"`: $\mathrm{sign}(\sum_t \delta_t) \sqrt{\sum_t (\delta_t/\sigma_t)^2}$, biased away from 0, see
      `composed_mu`.
    - `"gaussian"`: (mean y − mean x) / pooled standard deviation, with Hedges' small-sample correction: unbiased for
      two Gaussians of one spread.
    - `"auc"`: √2 Φ⁻¹(P(y > x)), ties half; only the order of the observations counts. The AUC is clipped to
      [1/(2nm), 1 − 1/(2nm)], so |μ| stays finite.
    - `"max_abs"`: the threshold scan of f-INE (arXiv 2510.10510). μ_τ = Φ⁻¹(1 − α_τ) − Φ⁻¹(β_τ) with α_τ the share of
      x above τ and β_τ the share of y up to τ; the μ_τ of largest size is returned. **Biased away from 0:** for two
      equal Gaussians (μ = 0) it returns 0.95 on average in absolute value, with a random sign, from 20 observations a
      side, 0.70 from 100 and 0.50 from 2,000. Shares of x are clipped to [1/(2n), 1 − 1/(2n)], those of y with m; the
      bias depends on that choice. A threshold beyond all observations is not scanned. Its interval is that of the
      biased quantity.

    The interval is the percentile interval of a moving-block bootstrap, as neighbouring steps are correlated. **It
    covers the noise of the estimate, not the model bias of σ**, which is held fixed, and is too short for few or
    strongly correlated steps: simulated, a 95 % interval of `"accumulated"` covers 91 % with 150 independent steps,
    88 % with 20 and 80 % with 10; where neighbours correlate by 0.6, 87 %, 68 % and 58 %.

    Args:
        with_s, without_s (array of `float`): `[n]` and `[m]`, in the order of the steps. `"accumulated"` and
            `"composed"` read them as pairs, n = m. Resampled jointly when n = m, otherwise each on its own.
        statistic (`"loss"` | `"gain"`): what the numbers are. A loss is worse when higher; a gain (a decrease of the
            loss in one step) is better when higher.
        method (`str`): see above.
        sigma (array of `float`, *optional*): `[n]` or one number, the standard deviation of the noise of a step of the
            two paired methods, in the unit of the observations. Defaults to `detrended_std(with_s)`.
        confidence (`float`): nominal coverage of the interval, in (0, 1).
        n_resamples (`int`): bootstrap resamples, at least 1.
        block_length (`int`, *optional*): steps in a block. Defaults to the cube root of the number of observations,
            rounded up.
        seed (`int` or `numpy.random.Generator`): source of the resamples.

    Returns:
        [`MuEstimate`]. Infinite where observations without any spread differ (`"gaussian"` and the paired methods).

    Raises:
        ValueError: fewer than 4 observations a side, NaN or infinite ones, unequal numbers of them for a paired
            method, `sigma` for another method, or an argument outside its range.
    """
    for name, value, allowed in (("statistic", statistic, Statistic), ("method", method, Method)):
        if value not in get_args(allowed):
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, get_args(allowed)))}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r}: must be strictly between 0 and 1, such as 0.95")
    losses_with = _observations("with_s", with_s, at_least=MIN_OBSERVATIONS)
    losses_without = _observations("without_s", without_s, at_least=MIN_OBSERVATIONS)
    if statistic == "gain":
        losses_with, losses_without = -losses_with, -losses_without
    n, m = len(losses_with), len(losses_without)
    paired = method in ("accumulated", "composed")
    if paired and n != m:
        raise ValueError(f"with_s, without_s: {n} and {m} observations; method={method!r} needs pairs, one per step")
    if sigma is not None and not paired:
        raise ValueError(f"sigma: method={method!r} takes the spread from the samples; leave sigma out")

    if paired:
        sigma = detrended_std(losses_with) if sigma is None else np.asarray(sigma, dtype=np.float64)
        if sigma.shape not in ((), (n,)) or not np.isfinite(sigma).all():
            raise ValueError(f"sigma: shape {sigma.shape}; must be one finite number or {n} of them, one per step")
        if sigma.min() < 0:
            raise ValueError(f"sigma: holds {sigma.min()}; a standard deviation is at least 0")
        sigma = np.broadcast_to(sigma, n)
        if (
            method == "accumulated"
        ):  # σ of the whole run is held: where few steps make up most of it, resamples miss them
            whole = np.sqrt(np.square(sigma).mean())
            sigma = np.full(n, whole)
        samples = losses_without - losses_with, sigma
        estimator = accumulated_mu if method == "accumulated" else composed_mu
    elif method == "gaussian":
        samples, estimator = (losses_with, losses_without), _standardised_difference
    else:
        samples, n_values = _rank(losses_with, losses_without)
        estimator = partial(_mu_from_auc if method == "auc" else _mu_from_scan, n_values=n_values)
    resampled = moving_block_bootstrap(
        estimator, *samples, n_resamples=n_resamples, block_length=block_length, generator=np.random.default_rng(seed)
    )
    # Order statistics, rounded outwards: interpolating between infinite ones would give NaN.
    low = np.quantile(resampled, (1 - confidence) / 2, method="lower")
    high = np.quantile(resampled, (1 + confidence) / 2, method="higher")
    mu = estimator(*(sample[None] for sample in samples))[0]
    return MuEstimate(float(mu), float(low), float(high), confidence, n, m, method)


def detrended_std(series: ArrayLike, window: int | None = None) -> Array:
    """Standard deviation of the noise around a slow trend, along the last axis.

    The trend is a centred running mean; towards the ends its window shrinks and stays centred, so that a straight line
    leaves no residual. A running mean over w steps takes 1/w of the residual's variance with it, which is corrected
    for: σ² = Σ_t r_t² / Σ_t (1 − 1/w_t) is unbiased for independent noise.

    Args:
        series (array of `float`): `[..., steps]` with at least 3 steps.
        window (`int`, *optional*): of the running mean, in steps, odd and at least 3. Defaults to 2⌊√steps / 2⌋ + 1,
            but at least 3.

    Returns:
        array: `[...]`, in the unit of `series`.

    Raises:
        ValueError: fewer than 3 steps, or a `window` that is even or below 3.
    """
    series = np.asarray(series, dtype=np.float64)
    n = series.shape[-1] if series.ndim else 0
    if n < 3:
        raise ValueError(f"series: {n} steps; needs at least 3 to tell noise from trend")
    window = max(3, 2 * (math.isqrt(n) // 2) + 1) if window is None else window
    if window < 3 or window % 2 == 0:
        raise ValueError(f"window={window!r}: must be odd and at least 3")
    series = series - series[..., :1]  # a constant series has no noise at all, not one of rounding errors
    step = np.arange(n)
    half = np.minimum(window // 2, np.minimum(step, n - 1 - step))
    sums = np.concatenate([np.zeros_like(series[..., :1]), series.cumsum(-1)], axis=-1)
    width = 2 * half + 1
    residual = series - (sums[..., step + half + 1] - sums[..., step - half]) / width
    return np.sqrt(np.square(residual).sum(-1) / (1 - 1 / width).sum())


def moving_block_indices(
    length: int, block_length: int | None, n_resamples: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Resamples of a series that keep neighbours together: blocks of consecutive steps, drawn with replacement.

    Args:
        length (`int`): steps in the series.
        block_length (`int` or `None`): steps in a block; `None` for the cube root of `length`, rounded up. The last
            block of a resample is cut to fit.
        n_resamples (`int`): rows of the result.
        generator (`numpy.random.Generator`): source of the blocks' first steps.

    Returns:
        array of `int`: `[n_resamples, length]`, each in [0, length).

    Raises:
        ValueError: `n_resamples` below 1, or `block_length` outside 1 … `length`.
    """
    if block_length is None:
        block_length = math.ceil(round(length ** (1 / 3), 9))  # rounded: ∛64 is 3.9999999999999996 in floats
    if not 1 <= block_length <= length:
        raise ValueError(f"block_length={block_length!r}: must be between 1 and the {length} observations")
    _require_resamples(n_resamples)
    shape = n_resamples, math.ceil(length / block_length), 1
    starts = generator.integers(length - block_length + 1, size=shape)
    return (starts + np.arange(block_length)).reshape(n_resamples, -1)[:, :length]


def moving_block_bootstrap(
    estimator: Callable[..., Array],
    *samples: NDArray,
    n_resamples: int,
    block_length: int | None = None,
    generator: np.random.Generator,
) -> Array:
    """`estimator` on resamples of the series: with the same blocks if they are of one length, else each on its own.

    Args:
        estimator (callable): `estimator(*resamples) -> [r]` with one `[r, n]` array per sample.
        samples (arrays): `[n]` each.
        n_resamples, block_length, generator: see `moving_block_indices`.

    Returns:
        array: `[n_resamples]`.

    Raises:
        ValueError: see `moving_block_indices`.
    """
    lengths = [len(sample) for sample in samples]
    _require_resamples(n_resamples)
    chunk = max(1, CHUNK_ELEMENTS // sum(lengths))
    results = []
    for done in range(0, n_resamples, chunk):
        rows = min(chunk, n_resamples - done)
        if len(set(lengths)) == 1:
            indices = [moving_block_indices(lengths[0], block_length, rows, generator)] * len(samples)
        else:
            indices = [moving_block_indices(length, block_length, rows, generator) for length in lengths]
        results.append(estimator(*(sample[index] for sample, index in zip(samples, indices, strict=True))))
    return np.concatenate(results)


def empirical_null(values: ArrayLike) -> tuple[float, float]:
    """Centre and scale of the bulk of the values, that of the examples which do nothing: median and IQR / 1.349.

    The scale is the standard deviation if the bulk is Gaussian, whatever up to a quarter of the values does on either
    side. If half of the values are the same the IQR is 0 and the plain standard deviation is returned, which outliers
    widen, so that nothing stands out by accident; 0 only if all values are the same.

    Args:
        values (array of `float`): `[n]`, n at least 2.

    Raises:
        ValueError: fewer than two values, or NaN or infinite ones.
    """
    values = _observations("values", values, at_least=2)
    lower, centre, upper = np.quantile(values, [0.25, 0.5, 0.75])
    scale = (upper - lower) / (2 * ndtri(0.75)) or (values - values[0]).std(ddof=1)
    return float(centre), float(scale)


def z_scores(values: ArrayLike) -> Array:
    """`[n]` distances from the centre of `empirical_null(values)` in its scale; 0 if all values are the same.

    Raises:
        ValueError: fewer than two values, or NaN or infinite ones.
    """
    centre, scale = empirical_null(values)
    return _ratio(np.asarray(values, dtype=np.float64) - centre, np.asarray(scale))


def benjamini_hochberg(p_values: ArrayLike) -> Array:
    """The least false-discovery rate at which each hypothesis is rejected (Benjamini and Hochberg, 1995).

    Valid for independent or positively dependent tests.

    Args:
        p_values (array of `float`): `[n]`, in [0, 1].

    Returns:
        array: `[n]` q-values in [0, 1], in the order of `p_values`; `q <= 0.05` holds 5 % false ones on average.

    Raises:
        ValueError: p-values that are not one-dimensional or not in [0, 1].
    """
    p = _observations("p_values", p_values, at_least=0)
    _require_within("p_values", p, (p >= 0) & (p <= 1), "within [0, 1]")
    descending = np.argsort(-p, kind="stable")
    q = np.empty_like(p)
    q[descending] = np.minimum.accumulate(p[descending] * len(p) / np.arange(len(p), 0, -1))
    return q


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


def _require_resamples(n_resamples: int) -> None:
    if n_resamples < 1:
        raise ValueError(f"n_resamples={n_resamples!r}: must be at least 1")


def _steps(delta: ArrayLike, sigma: ArrayLike) -> tuple[Array, Array]:
    delta, sigma = np.asarray(delta, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    _require_within("sigma", sigma, sigma >= 0, "at least 0")
    return delta, np.broadcast_to(sigma, delta.shape)


def _ratio(shift: Array, spread: Array) -> Array:
    """`shift / spread`, with 0/0 = 0: what does not move has no influence, however sharp its law."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(shift == 0, 0.0, shift / spread)[()]


def _mills_ratio(x: Array) -> Array:
    """Φ(−x) / φ(x)."""
    return math.sqrt(math.pi / 2) * erfcx(x / math.sqrt(2))


def _standardised_difference(x: Array, y: Array) -> Array:
    n, m = x.shape[-1], y.shape[-1]
    freedom = n + m - 2
    # Measured from each sample's own first value: constant samples then have a variance of exactly 0.
    first_x, first_y = x[..., 0], y[..., 0]
    x, y = x - x[..., :1], y - y[..., :1]
    shift = (first_y - first_x) + (y.mean(-1) - x.mean(-1))
    pooled = np.sqrt(((n - 1) * x.var(-1, ddof=1) + (m - 1) * y.var(-1, ddof=1)) / freedom)
    hedges = math.exp(gammaln(freedom / 2) - gammaln((freedom - 1) / 2)) * math.sqrt(2 / freedom)
    return hedges * _ratio(shift, pooled)


def _rank(x: Array, y: Array) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], int]:
    """Both samples with each value replaced by its place among the distinct values, and the number of those."""
    distinct, codes = np.unique(np.concatenate([x, y]), return_inverse=True)
    return (codes[: len(x)], codes[len(x) :]), len(distinct)


def _count_up_to(codes: NDArray[np.int64], n_values: int) -> NDArray[np.int64]:
    """`[r, n_values]`: in each row of `codes`, how many are at or below each value."""
    rows = np.arange(len(codes))[:, None] * n_values
    return np.bincount((codes + rows).ravel(), minlength=len(codes) * n_values).reshape(-1, n_values).cumsum(-1)


def _mu_from_auc(x: NDArray[np.int64], y: NDArray[np.int64], *, n_values: int) -> Array:
    pairs = x.shape[-1] * y.shape[-1]
    up_to_x, up_to_y = _count_up_to(x, n_values), _count_up_to(y, n_values)
    at_x, at_y = np.diff(up_to_x, prepend=0), np.diff(up_to_y, prepend=0)
    auc = (at_y * (up_to_x - at_x / 2)).sum(-1) / pairs
    return mu_of_auc(np.clip(auc, 0.5 / pairs, 1 - 0.5 / pairs))


def _mu_from_scan(x: NDArray[np.int64], y: NDArray[np.int64], *, n_values: int) -> Array:
    n, m = x.shape[-1], y.shape[-1]
    up_to_x, up_to_y = _count_up_to(x, n_values), _count_up_to(y, n_values)
    # A threshold beyond all observations tells nothing, but clipping by different n and m would make it seem to.
    beyond = ((up_to_x == 0) & (up_to_y == 0)) | ((up_to_x == n) & (up_to_y == m))
    quantile_x, quantile_y = (ndtri(np.clip(np.arange(k + 1) / k, 0.5 / k, 1 - 0.5 / k)) for k in (n, m))
    mu = np.where(beyond, 0.0, quantile_x[up_to_x] - quantile_y[up_to_y])
    return np.take_along_axis(mu, np.abs(mu).argmax(-1)[..., None], -1)[..., 0]


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
