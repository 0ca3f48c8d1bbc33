"""Closed forms against integration, estimators against simulation and enumeration, and what must hold for any sample."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from scipy.special import ndtri

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
from hf_unlearn.tradeoff.estimate import accumulated_mu, composed_mu, estimate_mu


METHODS = ("accumulated", "composed", "max_abs", "gaussian", "auc")
GRID = np.linspace(0, 1, 1001)
# Few distinct values, so that ties are common.
SAMPLE = st.lists(st.integers(-6, 6).map(lambda k: k / 4), min_size=1, max_size=30).map(np.array)
PAIRS = st.lists(st.tuples(st.integers(-99, 99), st.integers(-99, 99)), min_size=6, max_size=25).map(
    lambda pairs: np.array(pairs, dtype=float).T
)


def point_estimate(x, y, method, **options):
    """`estimate_mu` without its interval."""
    return estimate_mu(x, y, statistic="loss", method=method, n_resamples=1, **options).mu


class TestTradeOff:
    @given(p=SAMPLE, q=SAMPLE)
    @settings(max_examples=50, deadline=None)
    def test_is_the_lower_envelope_of_all_threshold_tests(self, p, q):
        curve = TradeOff.from_samples(p, q)
        assert (curve.alpha[0], curve.beta[0], curve.alpha[-1], curve.beta[-1]) == (0, 1, 1, 0)
        values = curve(GRID)
        assert (np.diff(values) <= 1e-12).all()
        assert (np.diff(values, 2) >= -1e-12).all()
        assert (values <= 1 - GRID + 1e-12).all()
        tests = [(0, 1), (1, 0)]
        for tau in np.concatenate([p, q, [-9]]):
            tests += [((p > tau).mean(), (q <= tau).mean()), ((p <= tau).mean(), (q > tau).mean())]
        alpha, beta = np.array(tests).T
        assert (curve(alpha) <= beta + 1e-12).all()
        for corner in zip(curve.alpha, curve.beta, strict=True):
            assert np.abs(np.array(tests) - corner).max(axis=1).min() < 1e-12

    @given(p=SAMPLE, q=SAMPLE)
    @settings(max_examples=50, deadline=None)
    def test_swapped_laws_swap_the_errors_and_a_turned_statistic_changes_nothing(self, p, q):
        there, back = TradeOff.from_samples(p, q), TradeOff.from_samples(q, p)
        assert there.auc == pytest.approx(back.auc, abs=1e-12)
        assert there.total_variation == pytest.approx(back.total_variation, abs=1e-12)
        # T(Q, P) is the inverse of T(P, Q): each corner of one, mirrored, lies on the other.
        least_alpha = np.array([there.alpha[there.beta <= beta].min() for beta in there.beta])
        inner = there.beta < 1
        np.testing.assert_allclose(back(there.beta[inner][::-1]), least_alpha[inner][::-1], atol=1e-12)
        np.testing.assert_allclose(TradeOff.from_samples(-p, -q)(GRID), there(GRID), atol=1e-12)

    def test_by_hand(self):
        curve = TradeOff.from_samples([0, 1, 2, 3], [2, 3, 4, 5])
        # "above 3" errs on none of P and half of Q; "above 1" on half of P and none of Q.
        assert curve.alpha.tolist() == [0, 0, 0.5, 1]
        assert curve.beta.tolist() == [1, 0.5, 0, 0]
        assert (curve(0), curve(0.25), curve.auc, curve.total_variation) == (0.5, 0.25, 1 - 0.5 * 0.5 / 2, 0.5)
        with pytest.raises(ValueError, match="read-only"):
            curve.alpha[0] = 1
        same, separate = TradeOff.from_samples([1, 1, 1], [1, 1]), TradeOff.from_samples([0, 1], [2, 3, 4])
        np.testing.assert_allclose(same(GRID), 1 - GRID, atol=1e-12)
        assert (same.auc, same.total_variation) == (0.5, 0)
        assert (separate(GRID) == 0).all()
        assert (separate.auc, separate.total_variation) == (1, 1)

    @pytest.mark.parametrize("mu", [0, 0.3, -1, 6])
    def test_gaussian(self, mu):
        curve = TradeOff.gaussian(mu)
        gap = curve(GRID) - gaussian_tradeoff(mu, GRID)
        assert gap.min() > -1e-12
        assert gap.max() < 3e-4
        assert curve.auc == pytest.approx(auc_of(mu), abs=1e-4)
        assert curve.total_variation == pytest.approx(total_variation_of(mu), abs=1e-4)
        assert len(TradeOff.gaussian(mu, 7).alpha) == 7


class TestClosedForms:
    def test_tradeoff_is_the_best_gaussian_test(self):
        threshold = np.linspace(-3, 4, 50)
        alpha, beta = stats.norm.sf(threshold), stats.norm.cdf(threshold - 1.3)
        np.testing.assert_allclose(gaussian_tradeoff(1.3, alpha), beta, atol=1e-12)
        np.testing.assert_allclose(gaussian_tradeoff(-1.3, alpha), beta, atol=1e-12)
        np.testing.assert_array_equal(gaussian_tradeoff([[0.0], [2.0]], [0, 1]), [[1, 0], [1, 0]])

    @pytest.mark.parametrize(
        ("mu", "epsilon"),
        [(0.2, 0), (1, 0.1), (3, 4), (1, 30), (2, 60), (0.01, 0.3), (1e-4, 2e-3), (30, 1500), (50, 2500), (60, 1000)],
    )
    def test_delta_is_the_hockey_stick_divergence_with_all_its_digits(self, mu, epsilon):
        near = epsilon / mu - mu / 2
        # δ = ∫ φ(near + s) (1 − e^(−μs)) ds over s > 0, with the largest value of the integrand taken out.
        top = max(0.0, -near)

        def integrand(s):
            return -math.exp(-near * s - s * s / 2 + near * top + top * top / 2) * math.expm1(-mu * s)

        points = [max(0.0, top - 12), top + 12]
        integral, _ = integrate.quad(integrand, *points, epsabs=0, epsrel=1e-12, limit=500, points=[top + 1 / mu])
        scale = math.exp(-(near**2) / 2 - near * top - top * top / 2) / math.sqrt(2 * math.pi)
        assert delta_of(mu, epsilon) == pytest.approx(integral * scale, rel=1e-9, abs=0)

    def test_delta_and_epsilon_at_their_ends(self):
        np.testing.assert_array_equal(delta_of([0, 0, 1, math.inf], [0, 1, 1e6, 3]), [0, 0, 0, 1])
        np.testing.assert_allclose(delta_of([0.5, 2], 0), total_variation_of([0.5, 2]), rtol=1e-12)
        assert delta_of(np.ones((2, 1)), np.ones(3)).shape == (2, 3)
        assert delta_of(-2, 1) == delta_of(2, 1)
        np.testing.assert_array_equal(epsilon_of([0, 0.1, -1, math.inf], [0.1, 0.5, 0.5, 0.5]), [0, 0, 0, math.inf])
        assert epsilon_of(np.ones((2, 1)), np.full(3, 1e-5)).shape == (2, 3)
        assert epsilon_of(1, 1e-5) == pytest.approx(4.38, abs=0.01)  # known from Gaussian differential privacy

    def test_epsilon_inverts_delta(self):
        mu, delta = np.meshgrid(np.geomspace(0.01, 20, 40), np.exp(np.linspace(-200, -0.1, 60)))
        epsilon = epsilon_of(mu, delta)
        assert (delta_of(mu, epsilon) <= delta).all()
        assert 500 < (epsilon > 0).sum() < epsilon.size
        np.testing.assert_allclose(delta_of(mu, epsilon)[epsilon > 0], delta[epsilon > 0], rtol=1e-6)

    def test_auc_and_total_variation(self):
        for mu in (0.0, 0.4, 1.7):
            beta = integrate.quad(lambda alpha, mu=mu: gaussian_tradeoff(mu, alpha), 0, 1)[0]
            assert auc_of(mu) == pytest.approx(1 - beta, abs=1e-7)
            assert total_variation_of(mu) == pytest.approx((1 - GRID - gaussian_tradeoff(mu, GRID)).max(), abs=1e-5)
        np.testing.assert_allclose(mu_of_auc(auc_of([0, 0.5, -3])), [0, 0.5, 3], atol=1e-12)
        assert mu_of_auc(0.3) == pytest.approx(-mu_of_auc(0.7))
        np.testing.assert_array_equal(mu_of_auc([0, 1]), [-math.inf, math.inf])


class TestSteps:
    def test_by_hand(self):
        assert accumulated_mu([1, 2, -0.5], [1, 2, 2]) == 2.5 / 3
        assert accumulated_mu([[1, 1], [2, -1]], [[1, 3], [2, 4]], axis=0).tolist() == [3 / math.sqrt(5), 0]
        assert accumulated_mu([1, 2, 3, 4], 5) == 1
        assert compose([3, -4]) == 5
        np.testing.assert_array_equal(compose([[3, 0], [4, -2]], axis=0), [5, 2])
        assert composed_mu([3, 0, -8], [1, 7, 2]) == -5
        assert composed_mu([[3], [8]], [[1], [2]], axis=0).tolist() == [5]
        assert composed_mu([1, -1], 1) == 0  # no sign to give
        for function in (accumulated_mu, composed_mu):  # without noise
            assert (function([0, 0], [0, 0]), function([0, 1], [0, 0])) == (0, math.inf)
            assert function([-1, 0], 0) == -math.inf

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
        series = np.random.default_rng(0).normal(size=50)
        assert detrended_std(series) == detrended_std(series, 7)  # 2⌊√50 / 2⌋ + 1


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
    @settings(max_examples=20, deadline=None)
    def test_swapping_the_samples_or_their_meaning_changes_the_sign(self, method, pair):
        x, y = pair
        sigma = 2.0 if method in ("accumulated", "composed") else None
        options = {"method": method, "sigma": sigma, "n_resamples": 1}
        mu = {
            (first, statistic): estimate_mu(*samples, statistic=statistic, **options).mu
            for first, samples in (("x", (x, y)), ("y", (y, x)))
            for statistic in ("loss", "gain")
        }
        size = abs if method == "max_abs" else float  # the scan may find two thresholds of one size and either sign
        assert size(mu["x", "loss"]) == pytest.approx(size(mu["y", "gain"]))
        assert size(mu["y", "loss"]) == pytest.approx(size(mu["x", "gain"]))
        assert size(mu["x", "loss"]) == pytest.approx(size(-mu["y", "loss"]))

    @pytest.mark.parametrize("method", METHODS)
    @given(pair=PAIRS, shift=st.integers(-50, 50), scale=st.sampled_from([0.25, 2, 1024]), seed=st.integers(0, 9))
    @settings(max_examples=20, deadline=None)
    def test_does_not_depend_on_the_unit(self, method, pair, shift, scale, seed):
        options = {"statistic": "loss", "method": method, "seed": seed, "n_resamples": 50}
        here, there = estimate_mu(*pair, **options), estimate_mu(*(scale * pair + shift), **options)
        for name in ("mu", "low", "high"):
            assert getattr(here, name) == pytest.approx(getattr(there, name), rel=1e-6, abs=1e-9)
        assert here.low <= here.high

    def test_gaussian_by_hand_and_for_tiny_samples(self):
        x, y = np.array([0.0, 1, 2, 3]), np.array([1.0, 1, 4, 4, 5])
        pooled = math.sqrt((3 * x.var(ddof=1) + 4 * y.var(ddof=1)) / 7)
        hedges = math.gamma(3.5) / (math.sqrt(3.5) * math.gamma(3))
        assert point_estimate(x, y, "gaussian") == pytest.approx(hedges * 1.5 / pooled)
        # Without Hedges' correction 2.0 becomes 2.31 (4 observations a side).
        x, y = np.random.default_rng(2).normal(size=(2, 100_000, 4)) + np.array([0, 2])[:, None, None]
        assert tradeoff._standardised_difference(x, y).mean() == pytest.approx(2, abs=0.02)

    @given(x=SAMPLE.filter(lambda v: len(v) > 3), y=SAMPLE.filter(lambda v: len(v) > 3))
    @settings(max_examples=50, deadline=None)
    def test_auc_and_scan_against_a_plain_loop(self, x, y):
        n, m = len(x), len(y)
        auc = ((y[:, None] > x) + (y[:, None] == x) / 2).mean()
        clipped = np.clip(auc, 0.5 / (n * m), 1 - 0.5 / (n * m))
        assert point_estimate(x, y, "auc") == pytest.approx(mu_of_auc(clipped), abs=1e-12)
        best = 0.0
        for tau in sorted({*x, *y})[:-1]:
            alpha = np.clip((x > tau).mean(), 0.5 / n, 1 - 0.5 / n)
            beta = np.clip((y <= tau).mean(), 0.5 / m, 1 - 0.5 / m)
            best = max(best, ndtri(1 - alpha) - ndtri(beta), key=abs)
        assert abs(point_estimate(x, y, "max_abs")) == pytest.approx(abs(best), abs=1e-12)

    def test_separate_samples_stay_finite(self):
        x, y = np.arange(10.0), 100 + np.arange(8.0)
        assert point_estimate(x, y, "auc") == pytest.approx(math.sqrt(2) * ndtri(1 - 1 / 160))
        assert point_estimate(x, y, "max_abs") == pytest.approx(ndtri(1 - 1 / 20) - ndtri(1 / 16))

    def test_max_abs_is_not_moved_by_unequal_sizes_alone(self):
        assert point_estimate(np.zeros(5), np.zeros(500), "max_abs") == 0
        spread = np.repeat(np.arange(5.0), 100)
        assert point_estimate(np.arange(5.0), spread, "max_abs") == pytest.approx(0, abs=1e-12)

    @pytest.mark.slow
    @pytest.mark.parametrize(("n", "repeats", "bias"), [(20, 2000, 0.95), (100, 1000, 0.70), (2000, 300, 0.50)])
    def test_max_abs_is_biased_as_documented(self, n, repeats, bias):
        generator = np.random.default_rng(4)
        estimates = np.array([point_estimate(*generator.normal(size=(2, n)), "max_abs") for _ in range(repeats)])
        assert np.abs(estimates).mean() == pytest.approx(bias, abs=0.03)
        assert (estimates > 0).mean() == pytest.approx(0.5, abs=0.1)

    def test_paired_methods_are_the_two_formulas(self):
        generator = np.random.default_rng(8)
        with_s, without_s, sigma = generator.normal(size=40), generator.normal(size=40), generator.uniform(1, 2, 40)
        spread = detrended_std(with_s)
        for method, formula in (("accumulated", accumulated_mu), ("composed", composed_mu)):
            gain = estimate_mu(with_s, without_s, statistic="gain", method=method, sigma=sigma)
            assert gain.mu == pytest.approx(formula(with_s - without_s, sigma))
            for given_sigma, used in ((sigma, sigma), (None, spread), (spread, spread)):
                mu = point_estimate(with_s, without_s, method, sigma=given_sigma)
                assert mu == pytest.approx(formula(without_s - with_s, used))

    @pytest.mark.parametrize("method", ["accumulated", "composed", "gaussian"])
    def test_without_any_spread(self, method):
        for a, b, mu in ((1, 1, 0), (0.1, 0.1, 0), (0.1, 0.7, math.inf), (0.7, 0.1, -math.inf)):
            estimate = estimate_mu(np.full(11, a), np.full(11, b), statistic="loss", method=method)
            assert (estimate.mu, estimate.low, estimate.high) == (mu, mu, mu)

    def test_some_resamples_without_spread(self):
        estimate = estimate_mu([0, 0, 0, 1], [5, 5, 5, 5], statistic="loss", method="gaussian")
        assert 0 < estimate.low <= estimate.mu < estimate.high == math.inf

    def test_result(self):
        generator = np.random.default_rng(0)
        x, y = generator.normal(size=30), generator.normal(size=20)
        options = {"statistic": "loss", "method": "auc"}
        estimate = estimate_mu(x, y, confidence=0.8, seed=7, **options)
        assert (estimate.n_with, estimate.n_without, estimate.n_observations) == (30, 20, 20)
        assert (estimate.confidence, estimate.method) == (0.8, "auc")
        assert estimate == estimate_mu(x, y, confidence=0.8, seed=7, **options)
        assert estimate != estimate_mu(x, y, confidence=0.8, seed=8, **options)
        wide = estimate_mu(x, y, confidence=0.99, seed=7, **options)
        assert wide.low < estimate.low < estimate.high < wide.high
        assert all(type(value) is float for value in (estimate.mu, estimate.low, estimate.high))
        with pytest.raises(TypeError, match="statistic"):  # must be said
            estimate_mu(x, y)


class TestMovingBlocks:
    @pytest.mark.parametrize(
        ("method", "sigma", "lengths"),
        [
            ("accumulated", "each", (6, 6)),
            ("composed", "each", (6, 6)),
            ("gaussian", None, (6, 6)),
            ("gaussian", None, (6, 4)),
            ("auc", None, (4, 6)),
        ],
    )
    def test_interval_is_that_of_all_resamples_enumerated(self, method, sigma, lengths):
        """Blocks of 3: of 6 steps there are 4 · 4 resamples, of 4 steps 2 · 2; with the same blocks if n = m."""
        generator = np.random.default_rng(3)
        x, y = (generator.normal(size=n) for n in lengths)
        sigma = sigma and generator.uniform(1, 2, size=6)

        def resamples(n):
            for starts in itertools.product(range(n - 2), repeat=2):
                yield np.concatenate([np.arange(start, start + 3) for start in starts])[:n]

        same = lengths[0] == lengths[1]
        indices = [(i, i) for i in resamples(6)] if same else itertools.product(*map(resamples, lengths))
        if method == "accumulated":  # σ of the whole run is held
            exact = sorted(accumulated_mu((y - x)[i], sigma) for i, _ in indices)
        else:
            own = (lambda i: {"sigma": sigma[i]}) if method == "composed" else (lambda i: {})
            exact = sorted(point_estimate(x[i], y[j], method, **own(i)) for i, j in indices)
        # Both quantiles lie in the middle of a step of the exact distribution, 5 standard deviations from its ends.
        confidence = 1 - 2 * 1.375 / 16
        options = {"sigma": sigma, "confidence": confidence, "n_resamples": 40_000, "block_length": 3}
        estimate = estimate_mu(x, y, statistic="loss", method=method, **options)
        at = int(1.375 / 16 * len(exact))
        assert (estimate.low, estimate.high) == (pytest.approx(exact[at]), pytest.approx(exact[-1 - at]))

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

    def test_default_is_the_cube_root_rounded_up(self):
        for length, expected in ((1, 1), (4, 2), (8, 2), (9, 3), (64, 4), (65, 5), (1000, 10)):
            default, same = (moving_block_indices(length, b, 50, np.random.default_rng(1)) for b in (None, expected))
            np.testing.assert_array_equal(default, same)

    def test_little_memory_is_enough(self, monkeypatch):
        monkeypatch.setattr("hf_unlearn.tradeoff.bootstrap.CHUNK_ELEMENTS", 100)
        shapes = []

        def estimator(x, y):
            shapes.append((x.shape, y.shape))
            return x.mean(-1)

        generator = np.random.default_rng(0)
        result = moving_block_bootstrap(
            estimator, np.arange(25.0), np.arange(7.0), n_resamples=10, generator=generator
        )
        assert shapes == [((n, 25), (n, 7)) for n in (3, 3, 3, 1)]
        assert len(np.unique(result)) > 5

    @pytest.mark.slow
    @pytest.mark.parametrize(("persistence", "block_length"), [(0.0, None), (0.6, None), (0.6, 12)])
    def test_interval_of_accumulated_covers(self, persistence, block_length):
        generator = np.random.default_rng(11)
        t, repeats, mu = 150, 300, 0.5
        noise = generator.normal(size=(repeats, t))
        for step in range(1, t):
            noise[:, step] += persistence * noise[:, step - 1]
        options = {"statistic": "loss", "sigma": 1.0, "n_resamples": 300, "block_length": block_length}
        estimates = [estimate_mu(np.zeros(t), mu / math.sqrt(t) + row, **options) for row in noise]
        assert 0.85 <= np.mean([e.low <= mu <= e.high for e in estimates]) <= 0.99


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
        assert empirical_null([0.1] * 5) == (0.1, 0)
        assert z_scores([0.1] * 5).tolist() == [0] * 5
        scores = z_scores([0] * 9 + [1])
        assert scores[:9].tolist() == [0] * 9
        assert scores[9] == pytest.approx(1 / np.std([0] * 9 + [1], ddof=1))

    @given(p=st.lists(st.sampled_from([0, 1e-4, 0.01, 0.02, 0.05, 0.3, 0.9, 1]), max_size=30))
    @settings(deadline=None)
    def test_benjamini_hochberg_agrees_with_scipy(self, p):
        expected = stats.false_discovery_control(np.array(p, dtype=float)) if p else []  # SciPy 1.17 refuses integers
        np.testing.assert_allclose(benjamini_hochberg(p), expected, rtol=1e-12)


def estimate(with_s=(1, 2, 3, 4, 5), without_s=(2, 1, 3, 5, 4), statistic="loss", **options):
    return estimate_mu(with_s, without_s, statistic=statistic, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TradeOff([0, 1], [1, 0, 0]), "shapes"),
        (lambda: TradeOff([0, 1], [0.9, 0]), r"go from \(0, 0.9\)"),
        (lambda: TradeOff([0, 0.5, 1], [1, 0.6, 0]), "not a convex curve"),
        (lambda: TradeOff([0, 0.5, 0.4, 1], [1, 0.2, 0.1, 0]), "not a convex curve"),
        (lambda: TradeOff([0, 0.2, 0.4, 1], [1, 0.2, 0.3, 0]), "not a convex curve"),
        (lambda: TradeOff([0, np.nan, 1], [1, 0.2, 0]), "not a convex curve"),
        (lambda: TradeOff.gaussian(1)([0.5, 1.5]), "alpha: holds 1.5"),
        (lambda: TradeOff.gaussian(1, 2), "n_points=2"),
        (lambda: TradeOff.gaussian(math.inf), "mu=inf"),
        (lambda: TradeOff.from_samples([1], []), "q: 0 observations"),
        (lambda: TradeOff.from_samples([np.nan], [1]), "p: holds nan"),
        (lambda: delta_of(1, -1), "epsilon: holds -1"),
        (lambda: epsilon_of(1, 0), "delta: holds 0"),
        (lambda: epsilon_of(1, 1), "delta: holds 1"),
        (lambda: mu_of_auc([0.2, 1.2]), "auc: holds 1.2"),
        (lambda: gaussian_tradeoff(1, np.nan), "alpha: holds nan"),
        (lambda: accumulated_mu([1, 2], [1, -1]), "sigma: holds -1"),
        (lambda: composed_mu([1, 2], [1, -1]), "sigma: holds -1"),
        (lambda: detrended_std([1, 2]), "series: 2 steps"),
        (lambda: detrended_std(np.arange(9), window=4), "window=4"),
        (lambda: detrended_std(np.arange(9), window=1), "window=1"),
        (lambda: empirical_null([1]), "values: 1 observations; needs at least 2"),
        (lambda: z_scores([1, 2, np.nan]), "values: holds nan"),
        (lambda: benjamini_hochberg([0.1, 1.5]), "p_values: holds 1.5"),
        (lambda: estimate(statistic="accuracy"), "statistic='accuracy': must be one of 'loss', 'gain'"),
        (lambda: estimate(method="mean"), "method='mean': must be one of 'accumulated'"),
        (lambda: estimate(with_s=[1, 2, 3]), "with_s: 3 observations; needs at least 4"),
        (lambda: estimate(without_s=[1, 2, 3, np.nan, 5]), "without_s: holds nan"),
        (lambda: estimate(with_s=[1, 2, 3, math.inf, 5]), "with_s: holds inf"),
        (lambda: estimate(with_s=np.ones((5, 2))), r"with_s: shape \(5, 2\)"),
        (lambda: estimate(with_s=np.ones(6)), "6 and 5 observations; method='accumulated' needs pairs"),
        (lambda: estimate(sigma=[1, 2]), r"sigma: shape \(2,\); must be one finite number or 5"),
        (lambda: estimate(sigma=np.nan), "sigma: .* finite"),
        (lambda: estimate(sigma=-1.0), "sigma: holds -1.0"),
        (lambda: estimate(sigma=1.0, method="auc"), "sigma: method='auc'"),
        (lambda: estimate(confidence=95), "confidence=95"),
        (lambda: estimate(n_resamples=0), "n_resamples=0"),
        (lambda: estimate(block_length=0), "block_length=0"),
        (lambda: estimate(block_length=6), "block_length=6: must be between 1 and the 5"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
