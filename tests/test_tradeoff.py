"""Closed forms against integration, estimators against simulation, and what must hold for any sample."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from sklearn.metrics import roc_auc_score

from hf_unlearn.tradeoff import estimate as tradeoff
from hf_unlearn.tradeoff.bootstrap import detrended_std, moving_block_bootstrap, moving_block_indices
from hf_unlearn.tradeoff.curve import (
    TradeOff,
    auc_of,
    compose,
    delta_of,
    epsilon_of,
    gaussian_tradeoff,
    mu_of_auc,
    total_variation_of,
)
from hf_unlearn.tradeoff.discoveries import benjamini_hochberg, empirical_null, z_scores
from hf_unlearn.tradeoff.estimate import MuEstimate, accumulated_mu, composed_mu, estimate_mu


METHODS = ("accumulated", "composed", "max_abs", "gaussian", "auc")
GRID = np.linspace(0, 1, 1001)
# Few distinct values, so that ties are common.
SAMPLE = st.lists(st.integers(-6, 6).map(lambda k: k / 4), min_size=1, max_size=30).map(np.array)
PAIRS = st.lists(st.tuples(st.integers(-99, 99), st.integers(-99, 99)), min_size=6, max_size=25).map(
    lambda pairs: np.array(pairs, dtype=float).T
)


def point_estimates(x, y, method):
    """`estimate_mu` without its interval."""
    return estimate_mu(x, y, statistic="loss", method=method, n_resamples=1).mu


class TestTradeOff:
    @given(p=SAMPLE, q=SAMPLE)
    @settings(deadline=None)
    def test_empirical_curves_are_convex_and_go_from_corner_to_corner(self, p, q):
        curve = TradeOff.from_samples(p, q)
        assert (curve.alpha[0], curve.beta[0], curve.alpha[-1], curve.beta[-1]) == (0, 1, 1, 0)
        values = curve(GRID)
        assert (np.diff(values) <= 1e-12).all()
        assert (np.diff(values, 2) >= -1e-12).all()
        assert (values <= 1 - GRID + 1e-12).all()

    @given(p=SAMPLE, q=SAMPLE)
    @settings(deadline=None)
    def test_no_threshold_test_is_better_and_every_corner_is_one(self, p, q):
        curve = TradeOff.from_samples(p, q)
        tests = [(0, 1), (1, 0)]
        for tau in np.concatenate([p, q, [-9]]):
            tests += [((p > tau).mean(), (q <= tau).mean()), ((p <= tau).mean(), (q > tau).mean())]
        alpha, beta = np.array(tests).T
        assert (curve(alpha) <= beta + 1e-12).all()
        for corner in zip(curve.alpha, curve.beta, strict=True):
            assert np.abs(np.array(tests) - corner).max(axis=1).min() < 1e-12

    @given(p=SAMPLE, q=SAMPLE)
    @settings(deadline=None)
    def test_swapping_the_laws_swaps_the_errors(self, p, q):
        there, back = TradeOff.from_samples(p, q), TradeOff.from_samples(q, p)
        assert there.auc == pytest.approx(back.auc, abs=1e-12)
        assert there.total_variation == pytest.approx(back.total_variation, abs=1e-12)
        # T(Q, P) is the inverse of T(P, Q): each corner of one, mirrored, lies on the other.
        inner = there.beta < 1
        np.testing.assert_allclose(back(there.beta[inner][::-1]), inverse(there)[inner][::-1], atol=1e-12)

    @given(p=SAMPLE, q=SAMPLE)
    @settings(deadline=None)
    def test_the_direction_of_the_statistic_does_not_matter(self, p, q):
        np.testing.assert_allclose(TradeOff.from_samples(p, q)(GRID), TradeOff.from_samples(-p, -q)(GRID), atol=1e-12)

    def test_by_hand(self):
        curve = TradeOff.from_samples([0, 1, 2, 3], [2, 3, 4, 5])
        # "above 3" errs on none of P and half of Q; "above 1" on half of P and none of Q.
        assert curve.alpha.tolist() == [0, 0, 0.5, 1]
        assert curve.beta.tolist() == [1, 0.5, 0, 0]
        assert curve(0) == 0.5
        assert curve(0.25) == 0.25
        assert curve.auc == 1 - 0.5 * 0.5 / 2
        assert curve.total_variation == 0.5

    def test_same_and_separate_samples(self):
        same, separate = TradeOff.from_samples([1, 1, 1], [1, 1]), TradeOff.from_samples([0, 1], [2, 3, 4])
        np.testing.assert_allclose(same(GRID), 1 - GRID, atol=1e-12)
        assert (same.auc, same.total_variation) == (0.5, 0)
        assert (separate(GRID) == 0).all()
        assert (separate.auc, separate.total_variation) == (1, 1)

    @pytest.mark.parametrize("mu", [0.5, 1, -2])
    def test_large_samples_follow_the_closed_form(self, mu):
        generator = np.random.default_rng(3)
        p, q = generator.normal(size=20_000), mu + generator.normal(size=20_000)
        curve = TradeOff.from_samples(p, q)
        # T(0) = 1, but no sample reaches so far into the tail.
        np.testing.assert_allclose(curve(GRID[5:]), gaussian_tradeoff(mu, GRID[5:]), atol=0.02)
        assert curve.auc == pytest.approx(auc_of(mu), abs=0.01)
        assert curve.total_variation == pytest.approx(total_variation_of(mu), abs=0.015)

    @pytest.mark.parametrize("mu", [0, 0.3, 1, -1, 3, 6])
    def test_gaussian(self, mu):
        curve = TradeOff.gaussian(mu)
        gap = curve(GRID) - gaussian_tradeoff(mu, GRID)
        assert gap.min() > -1e-12
        assert gap.max() < 3e-4
        assert curve.auc == pytest.approx(auc_of(mu), abs=1e-4)
        assert curve.total_variation == pytest.approx(total_variation_of(mu), abs=1e-4)
        assert len(TradeOff.gaussian(mu, 7).alpha) == 7

    def test_is_frozen(self):
        curve = TradeOff.gaussian(1)
        with pytest.raises(dataclasses.FrozenInstanceError):
            curve.alpha = GRID
        with pytest.raises(ValueError, match="read-only"):
            curve.alpha[0] = 1

    @pytest.mark.parametrize(
        ("alpha", "beta", "message"),
        [
            ([0, 1], [1, 0, 0], "shapes"),
            ([0, 1], [0.9, 0], r"go from \(0, 0.9\)"),
            ([0, 0.5, 1], [1, 0.6, 0], "not a convex curve"),
            ([0, 0.5, 0.4, 1], [1, 0.2, 0.1, 0], "not a convex curve"),
            ([0, 0.2, 0.4, 1], [1, 0.2, 0.3, 0], "not a convex curve"),
            ([0, np.nan, 1], [1, 0.2, 0], "not a convex curve"),
        ],
    )
    def test_refuses_what_is_no_curve(self, alpha, beta, message):
        with pytest.raises(ValueError, match=message):
            TradeOff(alpha, beta)

    def test_refuses_bad_arguments(self):
        with pytest.raises(ValueError, match="alpha: holds 1.5"):
            TradeOff.gaussian(1)([0.5, 1.5])
        with pytest.raises(ValueError, match="n_points=2"):
            TradeOff.gaussian(1, 2)
        with pytest.raises(ValueError, match="mu=inf"):
            TradeOff.gaussian(math.inf)
        with pytest.raises(ValueError, match="q: 0 observations"):
            TradeOff.from_samples([1], [])
        with pytest.raises(ValueError, match="p: holds nan"):
            TradeOff.from_samples([np.nan], [1])


def inverse(curve):
    """For each corner's type-II error, the least type-I error that reaches it."""
    return np.array([curve.alpha[curve.beta <= beta].min() for beta in curve.beta])


class TestClosedForms:
    def test_tradeoff_is_the_best_gaussian_test(self):
        threshold = np.linspace(-3, 4, 50)
        alpha, beta = stats.norm.sf(threshold), stats.norm.cdf(threshold - 1.3)
        np.testing.assert_allclose(gaussian_tradeoff(1.3, alpha), beta, atol=1e-12)
        np.testing.assert_allclose(gaussian_tradeoff(-1.3, alpha), beta, atol=1e-12)
        np.testing.assert_array_equal(gaussian_tradeoff([[0.0], [2.0]], [0, 1]), [[1, 0], [1, 0]])

    @pytest.mark.parametrize("mu", [0.2, 1, 3])
    @pytest.mark.parametrize("epsilon", [0, 0.1, 1, 4])
    def test_delta_is_the_hockey_stick_divergence(self, mu, epsilon):
        def excess(x):
            return max(stats.norm.pdf(x, mu) - math.exp(epsilon) * stats.norm.pdf(x), 0.0)

        start = epsilon / mu + mu / 2
        expected, _ = integrate.quad(excess, start, max(start, mu) + 12, epsabs=1e-13, limit=200)
        assert delta_of(mu, epsilon) == pytest.approx(expected, abs=1e-10)
        assert delta_of(-mu, epsilon) == delta_of(mu, epsilon)

    @pytest.mark.parametrize(
        ("mu", "epsilon"), [(1, 30), (2, 60), (0.01, 0.3), (1e-4, 2e-3), (30, 1500), (50, 2500), (60, 1000)]
    )
    def test_delta_keeps_its_digits_in_the_tail(self, mu, epsilon):
        near = epsilon / mu - mu / 2
        # δ = ∫ φ(near + s) (1 − e^(−μs)) ds over s > 0, with the largest value of the integrand taken out.
        top = max(0.0, -near)

        def integrand(s):
            return -math.exp(-near * s - s * s / 2 + near * top + top * top / 2) * math.expm1(-mu * s)

        points = [max(0.0, top - 12), top + 12]
        integral, _ = integrate.quad(integrand, *points, epsabs=0, epsrel=1e-12, limit=500, points=[top + 1 / mu])
        scale = math.exp(-(near**2) / 2 - near * top - top * top / 2) / math.sqrt(2 * math.pi)
        assert delta_of(mu, epsilon) == pytest.approx(integral * scale, rel=1e-9, abs=0)

    def test_delta_at_its_ends(self):
        np.testing.assert_array_equal(delta_of([0, 0, 1, math.inf], [0, 1, 1e6, 3]), [0, 0, 0, 1])
        np.testing.assert_allclose(delta_of([0.5, 2], 0), total_variation_of([0.5, 2]), rtol=1e-12)
        assert delta_of(np.ones((2, 1)), np.ones(3)).shape == (2, 3)

    @given(mu=st.floats(0.01, 20), log_delta=st.floats(-200, -0.1))
    @settings(deadline=None)
    def test_epsilon_inverts_delta(self, mu, log_delta):
        delta = math.exp(log_delta)
        epsilon = epsilon_of(mu, delta)
        if epsilon == 0:
            assert delta_of(mu, 0) <= delta
        else:
            assert delta_of(mu, epsilon) == pytest.approx(delta, rel=1e-6)
            assert delta_of(mu, epsilon) <= delta

    def test_epsilon_at_its_ends(self):
        np.testing.assert_array_equal(epsilon_of([0, 0.1, -1, math.inf], [0.1, 0.5, 0.5, 0.5]), [0, 0, 0, math.inf])
        assert epsilon_of(np.ones((2, 1)), np.full(3, 1e-5)).shape == (2, 3)
        assert epsilon_of(1, 1e-5) == pytest.approx(4.38, abs=0.01)  # known from Gaussian differential privacy

    def test_auc_and_total_variation(self):
        for mu in (0.0, 0.4, 1.7):
            beta = integrate.quad(lambda alpha, mu=mu: gaussian_tradeoff(mu, alpha), 0, 1)[0]
            assert auc_of(mu) == pytest.approx(1 - beta, abs=1e-7)
            assert total_variation_of(mu) == pytest.approx((1 - GRID - gaussian_tradeoff(mu, GRID)).max(), abs=1e-5)
        np.testing.assert_allclose(mu_of_auc(auc_of([0, 0.5, -3])), [0, 0.5, 3], atol=1e-12)
        assert mu_of_auc(0.3) == pytest.approx(-mu_of_auc(0.7))
        np.testing.assert_array_equal(mu_of_auc([0, 1]), [-math.inf, math.inf])

    def test_compose(self):
        assert compose([3, -4]) == 5
        np.testing.assert_array_equal(compose([[3, 0], [4, -2]], axis=0), [5, 2])
        # k looks at one pair of laws are one look at their mean, √k standard deviations sharper.
        x, y = np.random.default_rng(0).normal(size=(2, 20_000, 9)).mean(-1)
        together = point_estimates(x, y + 0.2, "gaussian")
        assert together == pytest.approx(compose(np.full(9, 0.2)), abs=0.04)

    @pytest.mark.parametrize(
        ("function", "value", "message"),
        [
            (lambda x: delta_of(1, x), -1, "epsilon: holds -1"),
            (lambda x: epsilon_of(1, x), 0, "delta: holds 0"),
            (lambda x: epsilon_of(1, x), 1, "delta: holds 1"),
            (mu_of_auc, [0.2, 1.2], "auc: holds 1.2"),
            (lambda x: gaussian_tradeoff(1, x), np.nan, "alpha: holds nan"),
        ],
    )
    def test_refuse_bad_arguments(self, function, value, message):
        with pytest.raises(ValueError, match=message):
            function(value)


class TestSteps:
    def test_accumulated_by_hand(self):
        assert accumulated_mu([1, 2, -0.5], [1, 2, 2]) == 2.5 / 3
        assert accumulated_mu([[1, 1], [2, -1]], [[1, 3], [2, 4]], axis=0).tolist() == [3 / math.sqrt(5), 0]
        assert accumulated_mu([1, 2, 3, 4], 5) == 1

    def test_composed_by_hand(self):
        assert composed_mu([3, 0, -8], [1, 7, 2]) == -5
        assert composed_mu([[3], [8]], [[1], [2]], axis=0).tolist() == [5]
        assert composed_mu([1, -1], 1) == 0  # no sign to give

    @pytest.mark.parametrize("function", [accumulated_mu, composed_mu])
    def test_without_noise(self, function):
        assert function([0, 0], [0, 0]) == 0
        assert function([0, 1], [0, 0]) == math.inf
        assert function([-1, 0], 0) == -math.inf

    @pytest.mark.parametrize("function", [accumulated_mu, composed_mu])
    def test_refuse_negative_sigma(self, function):
        with pytest.raises(ValueError, match="sigma: holds -1"):
            function([1, 2], [1, -1])

    def test_accumulated_is_mu_of_the_sum(self):
        generator = np.random.default_rng(5)
        sigma, shift = generator.uniform(0.5, 2, size=30), generator.normal(0.1, 0.2, size=30)
        noise = generator.normal(size=(2, 20_000, 30)) * sigma
        ends = noise[0].sum(-1), (noise[1] + shift).sum(-1)
        assert accumulated_mu(shift, sigma) == pytest.approx(point_estimates(*ends, "gaussian"), abs=0.03)

    def test_detrended_std_is_unbiased(self):
        generator = np.random.default_rng(6)
        trend = 5 * np.exp(-np.arange(80) / 200)
        for window in (None, 3, 9, 61):
            series = 3 * generator.normal(size=(2000, 80)) + (0 if window == 61 else trend)
            estimates = detrended_std(series, window)
            assert estimates.shape == (2000,)
            assert np.sqrt(np.square(estimates).mean()) == pytest.approx(3, rel=0.02)

    def test_detrended_std_by_hand(self):
        # Window 3: residuals 0 at the ends, 0 − 1/3, 1 − 1/3, 0 − 1/3 between; each keeps 2/3 of the variance.
        assert detrended_std([0, 0, 1, 0, 0]) == pytest.approx(math.sqrt((1 + 4 + 1) / 9 / 2))
        assert detrended_std(np.arange(50) * 0.7) == pytest.approx(0, abs=1e-12)
        assert detrended_std(np.full(50, 0.1)) == 0

    def test_detrended_std_refuses_bad_arguments(self):
        with pytest.raises(ValueError, match="series: 2 steps"):
            detrended_std([1, 2])
        with pytest.raises(ValueError, match="window=4"):
            detrended_std(np.arange(9), window=4)


class TestEstimateMu:
    @pytest.mark.parametrize("method", METHODS)
    def test_is_positive_when_s_helps(self, method):
        generator = np.random.default_rng(0)
        low = generator.normal(size=100)
        high = low + 1.5 + 0.3 * generator.normal(size=100)
        # Without S the loss is higher, or the gain lower: S helps.
        for with_s, without_s, statistic in ((low, high, "loss"), (high, low, "gain")):
            helps = estimate_mu(with_s, without_s, statistic=statistic, method=method)
            assert 0 < helps.low <= helps.mu <= helps.high
            harms = estimate_mu(without_s, with_s, statistic=statistic, method=method)
            assert harms.low <= harms.mu <= harms.high < 0

    @pytest.mark.parametrize("method", METHODS)
    @given(pair=PAIRS)
    @settings(max_examples=30, deadline=None)
    def test_swapping_the_samples_or_their_meaning_changes_the_sign(self, method, pair):
        x, y = pair
        mu = {
            (first, statistic): estimate_mu(*samples, statistic=statistic, method=method, sigma=sigma).mu
            for sigma in [2.0 if method in ("accumulated", "composed") else None]
            for first, samples in (("x", (x, y)), ("y", (y, x)))
            for statistic in ("loss", "gain")
        }
        size = abs if method == "max_abs" else float  # the scan may find two thresholds of one size and either sign
        assert size(mu["x", "loss"]) == pytest.approx(size(mu["y", "gain"]))
        assert size(mu["y", "loss"]) == pytest.approx(size(mu["x", "gain"]))
        assert size(mu["x", "loss"]) == pytest.approx(size(-mu["y", "loss"]))

    @pytest.mark.parametrize("method", METHODS)
    @given(pair=PAIRS, shift=st.integers(-50, 50), scale=st.sampled_from([0.25, 2, 1024]), seed=st.integers(0, 9))
    @settings(max_examples=30, deadline=None)
    def test_does_not_depend_on_the_unit(self, method, pair, shift, scale, seed):
        x, y = pair
        here = estimate_mu(x, y, statistic="loss", method=method, seed=seed, n_resamples=50)
        there = estimate_mu(
            scale * x + shift, scale * y + shift, statistic="loss", method=method, seed=seed, n_resamples=50
        )
        for name in ("mu", "low", "high"):
            assert getattr(here, name) == pytest.approx(getattr(there, name), rel=1e-6, abs=1e-9)
        assert here.low <= here.high

    @pytest.mark.parametrize("method", ["gaussian", "auc"])
    @pytest.mark.parametrize(("mu", "n"), [(0, 100), (1, 100), (1, 400), (-1, 400)])
    def test_two_sample_forms_are_unbiased(self, method, mu, n):
        generator = np.random.default_rng(1)
        estimates = [
            point_estimates(generator.normal(size=n), generator.normal(mu, size=n), method) for _ in range(400)
        ]
        error = math.sqrt(2 / n) * math.sqrt(1 + mu**2 / 8)
        assert np.std(estimates) == pytest.approx(error, rel=0.2)
        assert np.mean(estimates) == pytest.approx(mu, abs=4 * error / math.sqrt(400))

    def test_gaussian_is_unbiased_for_tiny_samples(self):
        """Without Hedges' correction 2.0 becomes 2.31 (4 observations a side)."""
        generator = np.random.default_rng(2)
        x, y = generator.normal(size=(2, 100_000, 4)) + np.array([0, 2])[:, None, None]
        assert tradeoff._standardised_difference(x, y).mean() == pytest.approx(2, abs=0.02)

    def test_gaussian_by_hand(self):
        x, y = np.array([0.0, 1, 2, 3]), np.array([1.0, 1, 4, 4, 5])
        pooled = math.sqrt((3 * x.var(ddof=1) + 4 * y.var(ddof=1)) / 7)
        hedges = math.gamma(3.5) / (math.sqrt(3.5) * math.gamma(3))
        assert point_estimates(x, y, "gaussian") == pytest.approx(hedges * 1.5 / pooled)

    @given(x=SAMPLE.filter(lambda v: len(v) > 3), y=SAMPLE.filter(lambda v: len(v) > 3))
    @settings(deadline=None)
    def test_auc_and_scan_against_a_plain_loop(self, x, y):
        n, m = len(x), len(y)
        auc = roc_auc_score([0] * n + [1] * m, np.concatenate([x, y]))
        clipped = np.clip(auc, 0.5 / (n * m), 1 - 0.5 / (n * m))
        assert point_estimates(x, y, "auc") == pytest.approx(mu_of_auc(clipped))
        best = 0.0
        for tau in sorted({*x, *y})[:-1]:
            alpha = np.clip((x > tau).mean(), 0.5 / n, 1 - 0.5 / n)
            beta = np.clip((y <= tau).mean(), 0.5 / m, 1 - 0.5 / m)
            best = max(best, stats.norm.ppf(1 - alpha) - stats.norm.ppf(beta), key=abs)
        assert abs(point_estimates(x, y, "max_abs")) == pytest.approx(abs(best), abs=1e-12)

    @pytest.mark.parametrize(("n", "repeats", "bias"), [(20, 2000, 0.95), (100, 1000, 0.70), (2000, 300, 0.50)])
    def test_max_abs_is_biased_as_documented(self, n, repeats, bias):
        generator = np.random.default_rng(4)
        estimates = np.array([point_estimates(*generator.normal(size=(2, n)), "max_abs") for _ in range(repeats)])
        assert np.abs(estimates).mean() == pytest.approx(bias, abs=0.03)
        assert (estimates > 0).mean() == pytest.approx(0.5, abs=0.1)

    def test_max_abs_is_not_moved_by_unequal_sizes_alone(self):
        assert point_estimates(np.zeros(5), np.zeros(500), "max_abs") == 0
        assert point_estimates(np.arange(5.0), np.repeat(np.arange(5.0), 100), "max_abs") == pytest.approx(
            0, abs=1e-12
        )

    def test_paired_methods_are_the_two_formulas(self):
        generator = np.random.default_rng(8)
        with_s, without_s, sigma = generator.normal(size=40), generator.normal(size=40), generator.uniform(1, 2, 40)
        for method, formula in (("accumulated", accumulated_mu), ("composed", composed_mu)):
            loss = estimate_mu(with_s, without_s, statistic="loss", method=method, sigma=sigma)
            gain = estimate_mu(with_s, without_s, statistic="gain", method=method, sigma=sigma)
            assert loss.mu == formula(without_s - with_s, sigma)
            assert gain.mu == formula(with_s - without_s, sigma)
            default = estimate_mu(with_s, without_s, statistic="loss", method=method)
            assert default.mu == formula(without_s - with_s, np.full(40, detrended_std(with_s)))
            assert (
                default.mu
                == estimate_mu(with_s, without_s, statistic="loss", method=method, sigma=detrended_std(with_s)).mu
            )

    def test_recovers_an_accumulated_mu_of_one(self):
        generator = np.random.default_rng(9)
        t = 400
        with_s = generator.normal(size=t) + 3 * np.exp(-np.arange(t) / 80)
        without_s = with_s + 1 / math.sqrt(t) + 0.2 * generator.normal(size=t)
        estimate = estimate_mu(with_s, without_s, statistic="loss")
        assert estimate.mu == pytest.approx(1, abs=0.45)  # Σδ alone has a standard deviation of 0.2
        assert estimate.low < 1 < estimate.high

    @pytest.mark.parametrize(
        ("sample", "mu"), [((1, 1), 0), ((0.1, 0.1), 0), ((0.1, 0.7), math.inf), ((0.7, 0.1), -math.inf)]
    )
    @pytest.mark.parametrize("method", ["accumulated", "composed", "gaussian"])
    def test_without_any_spread(self, method, sample, mu):
        estimate = estimate_mu(np.full(11, sample[0]), np.full(11, sample[1]), statistic="loss", method=method)
        assert (estimate.mu, estimate.low, estimate.high) == (mu, mu, mu)

    def test_separate_samples_stay_finite(self):
        x, y = np.arange(10.0), 100 + np.arange(8.0)
        assert point_estimates(x, y, "auc") == pytest.approx(math.sqrt(2) * stats.norm.ppf(1 - 1 / 160))
        assert point_estimates(x, y, "max_abs") == pytest.approx(stats.norm.ppf(1 - 1 / 20) - stats.norm.ppf(1 / 16))

    def test_result(self):
        generator = np.random.default_rng(0)
        x, y = generator.normal(size=30), generator.normal(size=20)
        estimate = estimate_mu(x, y, statistic="loss", method="auc", confidence=0.8, seed=7)
        assert (estimate.n_with, estimate.n_without, estimate.n_observations) == (30, 20, 20)
        assert (estimate.confidence, estimate.method) == (0.8, "auc")
        assert estimate == estimate_mu(x, y, statistic="loss", method="auc", confidence=0.8, seed=7)
        assert estimate != estimate_mu(x, y, statistic="loss", method="auc", confidence=0.8, seed=8)
        wide = estimate_mu(x, y, statistic="loss", method="auc", confidence=0.99, seed=7)
        assert wide.low < estimate.low < estimate.high < wide.high
        with pytest.raises(dataclasses.FrozenInstanceError):
            estimate.mu = 0
        assert isinstance(estimate, MuEstimate)
        assert all(type(value) is float for value in (estimate.mu, estimate.low, estimate.high))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"statistic": "accuracy"}, "statistic='accuracy': must be one of 'loss', 'gain'"),
            ({"method": "mean"}, "method='mean': must be one of 'accumulated'"),
            ({"with_s": [1, 2, 3]}, "with_s: 3 observations; needs at least 4"),
            ({"without_s": [1, 2, 3, np.nan, 5]}, "without_s: holds nan"),
            ({"with_s": [1, 2, 3, math.inf, 5]}, "with_s: holds inf"),
            ({"with_s": np.ones((5, 2))}, r"with_s: shape \(5, 2\)"),
            ({"with_s": np.ones(6)}, "6 and 5 observations; method='accumulated' needs pairs"),
            ({"sigma": [1, 2]}, r"sigma: shape \(2,\); must be one finite number or 5"),
            ({"sigma": np.nan}, "sigma: .* finite"),
            ({"sigma": -1.0}, "sigma: holds -1.0"),
            ({"sigma": 1.0, "method": "auc"}, "sigma: method='auc'"),
            ({"confidence": 95}, "confidence=95"),
            ({"n_resamples": 0}, "n_resamples=0"),
            ({"block_length": 0}, "block_length=0"),
            ({"block_length": 6}, "block_length=6: must be between 1 and the 5"),
        ],
    )
    def test_refuses_bad_arguments(self, changes, message):
        arguments = {"with_s": [1, 2, 3, 4, 5], "without_s": [2, 1, 3, 5, 4], "statistic": "loss"} | changes
        with pytest.raises(ValueError, match=message) as error:
            estimate_mu(**arguments)
        assert "\n" not in str(error.value)

    def test_statistic_must_be_said(self):
        with pytest.raises(TypeError, match="statistic"):
            estimate_mu([1, 2, 3, 4], [1, 2, 3, 4])


class TestMovingBlocks:
    @given(length=st.integers(1, 60), data=st.data())
    @settings(deadline=None)
    def test_indices_are_runs_of_consecutive_steps(self, length, data):
        block_length = data.draw(st.integers(1, length))
        indices = moving_block_indices(length, block_length, 5, np.random.default_rng(0))
        assert indices.shape == (5, length)
        assert indices.min() >= 0
        assert indices.max() < length
        inside_a_block = np.arange(1, length) % block_length != 0
        assert (np.diff(indices)[:, inside_a_block] == 1).all()

    def test_every_block_is_drawn(self):
        indices = moving_block_indices(6, 3, 2000, np.random.default_rng(0))
        starts, counts = np.unique(indices[:, [0, 3]], return_counts=True)
        assert starts.tolist() == [0, 1, 2, 3]
        np.testing.assert_allclose(counts, 1000, atol=100)

    @pytest.mark.parametrize(("length", "expected"), [(1, 1), (4, 2), (8, 2), (9, 3), (64, 4), (65, 5), (1000, 10)])
    def test_default_is_the_cube_root_rounded_up(self, length, expected):
        generators = np.random.default_rng(1), np.random.default_rng(1)
        default = moving_block_indices(length, None, 50, generators[0])
        np.testing.assert_array_equal(default, moving_block_indices(length, expected, 50, generators[1]))

    def test_equal_lengths_are_resampled_together(self):
        series = np.arange(20.0)
        gaps = moving_block_bootstrap(
            lambda x, y: np.abs(x - y).max(-1), series, series, n_resamples=30, generator=np.random.default_rng(0)
        )
        assert gaps.tolist() == [0] * 30
        shapes = []
        moving_block_bootstrap(
            lambda x, y: shapes.append((x.shape, y.shape)) or x.sum(-1),
            series,
            series[:7],
            n_resamples=30,
            generator=np.random.default_rng(0),
        )
        assert shapes == [((30, 20), (30, 7))]

    def test_little_memory_is_enough(self, monkeypatch):
        monkeypatch.setattr(tradeoff, "CHUNK_ELEMENTS", 100)
        rows = []
        result = moving_block_bootstrap(
            lambda x: rows.append(len(x)) or x.mean(-1),
            np.arange(30.0),
            n_resamples=10,
            generator=np.random.default_rng(0),
        )
        assert rows == [3, 3, 3, 1]
        assert len(np.unique(result)) > 5

    @pytest.mark.parametrize(("persistence", "block_length"), [(0.0, None), (0.6, None), (0.6, 12)])
    def test_interval_of_accumulated_covers(self, persistence, block_length):
        generator = np.random.default_rng(11)
        t, repeats, mu = 150, 300, 0.5
        noise = generator.normal(size=(repeats, t))
        for step in range(1, t):
            noise[:, step] += persistence * noise[:, step - 1]
        estimates = [
            estimate_mu(
                np.zeros(t),
                mu / math.sqrt(t) + row,
                statistic="loss",
                sigma=1.0,
                n_resamples=300,
                block_length=block_length,
            )
            for row in noise
        ]
        coverage = np.mean([e.low <= mu <= e.high for e in estimates])
        assert 0.85 <= coverage <= 0.99

    def test_single_steps_are_too_small_blocks_for_correlated_noise(self):
        """What the blocks are for: the same noise, resampled step by step, looks far more certain than it is."""
        noise = np.random.default_rng(12).normal(size=400)
        for step in range(1, 400):
            noise[step] += 0.8 * noise[step - 1]
        widths = [
            estimate.high - estimate.low
            for block_length in (1, 20)
            for estimate in [estimate_mu(np.zeros(400), noise, statistic="loss", sigma=1.0, block_length=block_length)]
        ]
        assert widths[1] > 1.8 * widths[0]

    def test_interval_of_two_samples_covers(self):
        generator = np.random.default_rng(13)
        for method in ("gaussian", "auc"):
            for m in (80, 50):
                estimates = [
                    estimate_mu(
                        generator.normal(size=80),
                        generator.normal(0.7, size=m),
                        statistic="loss",
                        method=method,
                        n_resamples=200,
                    )
                    for _ in range(150)
                ]
                assert 0.85 <= np.mean([e.low <= 0.7 <= e.high for e in estimates]) <= 0.99


class TestOverExamples:
    def test_null_ignores_what_stands_out(self):
        generator = np.random.default_rng(0)
        values = generator.normal(5, 2, size=20_000)
        values[:1000] += 100
        centre, scale = empirical_null(values)
        assert centre == pytest.approx(5, abs=0.2)
        assert scale == pytest.approx(2, rel=0.1)
        assert empirical_null(values[1000:]) == (pytest.approx(5, abs=0.05), pytest.approx(2, rel=0.02))

    def test_z_scores_by_hand(self):
        np.testing.assert_allclose(z_scores([1, 2, 3, 4, 5]), np.array([-2, -1, 0, 1, 2]) / (2 / 1.3489795))

    def test_equal_values(self):
        assert empirical_null([0.1] * 5) == (0.1, 0)
        assert z_scores([0.1] * 5).tolist() == [0] * 5
        scores = z_scores([0] * 9 + [1])
        assert scores[:9].tolist() == [0] * 9
        assert scores[9] == pytest.approx(1 / np.std([0] * 9 + [1], ddof=1))

    @given(p=st.lists(st.sampled_from([0, 1e-4, 0.01, 0.02, 0.05, 0.3, 0.9, 1]), max_size=30))
    @settings(deadline=None)
    def test_benjamini_hochberg_agrees_with_scipy(self, p):
        expected = (
            stats.false_discovery_control(np.array(p, dtype=float)) if p else []
        )  # SciPy 1.17 refuses whole numbers
        np.testing.assert_allclose(benjamini_hochberg(p), expected, rtol=1e-12)

    def test_false_discovery_rate_is_held(self):
        generator = np.random.default_rng(3)
        shares = []
        for _ in range(300):
            scores = generator.normal(size=200) + np.where(np.arange(200) < 20, 4, 0)
            found = np.flatnonzero(benjamini_hochberg(stats.norm.sf(z_scores(scores))) <= 0.1)
            shares.append((found >= 20).mean() if len(found) else 0)
        assert 0.02 < np.mean(shares) < 0.12

    def test_refuse_bad_arguments(self):
        with pytest.raises(ValueError, match="values: 1 observations; needs at least 2"):
            empirical_null([1])
        with pytest.raises(ValueError, match="values: holds nan"):
            z_scores([1, 2, np.nan])
        with pytest.raises(ValueError, match="p_values: holds 1.5"):
            benjamini_hochberg([0.1, 1.5])
