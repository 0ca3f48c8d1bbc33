"""Thresholds against counting, and their promises against the laws that they are made of."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, norm

from hf_unlearn.filtering.fitting.thresholds import (
    Threshold,
    allowed_exceedances,
    max_false_alarm,
    min_recall,
    pooled_mean,
    samples_needed,
)


DRAWS = 1000


def scattered(share):
    """What four standard errors of a share allow."""
    return 4 * math.sqrt(share * (1 - share) / DRAWS)


def by_trying(samples, rate, confidence):
    fitting = np.flatnonzero(binom.cdf(np.arange(samples + 1), samples, rate) <= 1 - confidence)
    return int(max(fitting, default=-1))


class TestAllowedExceedances:
    def test_against_trying_all(self):
        for samples in (0, 1, 2, 10, 58, 59, 60, 93, 200, 1000):
            for rate, confidence in ((0.01, 0.95), (0.05, 0.95), (0.05, 0.5), (0.3, 0.9), (0.9, 0.999)):
                assert allowed_exceedances(samples, rate, confidence) == by_trying(samples, rate, confidence)

    @settings(max_examples=100, deadline=None)
    @given(st.integers(1, 300), st.floats(0.001, 0.999), st.floats(0.01, 0.999))
    def test_is_the_largest_that_keeps_the_promise(self, samples, rate, confidence):
        j = allowed_exceedances(samples, rate, confidence)
        assert j == by_trying(samples, rate, confidence)
        # With the (n − j)-th smallest of n scores as threshold, the share of the law above it is Beta(j + 1, n − j).
        if j >= 0:
            assert beta.cdf(rate, j + 1, samples - j) >= confidence - 1e-9
        if j + 1 < samples:
            assert beta.cdf(rate, j + 2, samples - j - 1) < confidence + 1e-9


class TestSamplesNeeded:
    def test_known_numbers(self):
        assert samples_needed(0.05, 0.95) == 59
        assert samples_needed(0.01, 0.95) == 299
        assert samples_needed(0.5, 0.875) == 3  # ½³ = 1 − 0.875

    @settings(max_examples=100, deadline=None)
    @given(st.floats(0.01, 0.9), st.floats(0.05, 0.99))
    def test_is_the_least_number(self, rate, confidence):
        needed = samples_needed(rate, confidence)
        power = (1 - rate) ** needed
        if abs(power - (1 - confidence)) > 1e-7:  # else it hangs on rounding
            assert allowed_exceedances(needed, rate, confidence) >= 0
        assert needed == 1 or allowed_exceedances(needed - 1, rate, confidence) < 0

    def test_one_less_is_refused(self):
        scores = np.arange(59.0)
        assert max_false_alarm(scores, 0.05, 0.95).value == 58
        with pytest.raises(
            ValueError, match=r"^hats: max_false_alarm=0.05 .* needs 59 clean .* there are 58; [^\n]*$"
        ):
            max_false_alarm(scores[:58], 0.05, 0.95, concept="hats")
        with pytest.raises(ValueError, match=r"^hats: min_recall=0.95 .* needs 59 undesired .* there are 58; [^\n]*$"):
            min_recall(scores[:58], 0.95, 0.95, concept="hats")
        # 5 % of the clean ones are 4.5 % of all
        needed = math.ceil(math.log(0.05) / math.log(1 - 0.045))
        assert max_false_alarm(np.arange(float(needed)), 0.05, 0.95, max_prevalence=0.1).value == needed - 1
        with pytest.raises(ValueError, match=rf"needs {needed} unmarked .* there are {needed - 1}; "):
            max_false_alarm(np.arange(needed - 1.0), 0.05, 0.95, max_prevalence=0.1)
        with pytest.raises(ValueError, match="there are 0"):
            max_false_alarm(np.zeros(0), 0.05, 0.95)


class TestMaxFalseAlarm:
    @pytest.mark.parametrize("samples", [59, 93, 500])
    def test_promise_is_kept_as_often_as_the_law_says(self, samples):
        """False alarms of a normal law are known: none is estimated here."""
        random = np.random.default_rng(samples)
        taus = [max_false_alarm(random.standard_normal(samples), 0.05, 0.95).value for _ in range(DRAWS)]
        exact = 1 - binom.cdf(by_trying(samples, 0.05, 0.95), samples, 0.05)
        assert exact >= 0.95
        assert abs(np.mean(norm.sf(taus) <= 0.05) - exact) < scattered(exact)

    def test_order_of_scores_does_not_matter(self):
        scores = np.random.default_rng(0).standard_normal(200)
        expected = np.sort(scores)[200 - 1 - by_trying(200, 0.05, 0.9)]
        assert max_false_alarm(scores, 0.05, 0.9).value == max_false_alarm(scores[::-1], 0.05, 0.9).value == expected

    @pytest.mark.parametrize("undesired_at", ["lowest", "highest", "anywhere"])
    def test_contaminated_samples(self, undesired_at):
        """Clean ones are uniform in [0, 1], so that a threshold there has 1 − τ false alarms; 10 % are undesired."""
        random, samples, kept = np.random.default_rng(7), 400, 0
        for _ in range(DRAWS):
            scores = random.random(samples)
            undesired = random.random(samples) < 0.1
            place = {"lowest": -1.0, "highest": 2.0, "anywhere": random.random(samples)}[undesired_at]
            scores = np.where(undesired, place, scores)
            tau = max_false_alarm(scores, 0.05, 0.95, max_prevalence=0.1).value
            kept += 1 - np.clip(tau, 0, 1) <= 0.05
        # Where they are the lowest, q = (1 − π) a: the bound is reached.
        exact = 1 - binom.cdf(by_trying(samples, 0.045, 0.95), samples, 0.045)
        assert kept / DRAWS >= 0.95 - scattered(0.95)
        if undesired_at == "lowest":
            assert abs(kept / DRAWS - exact) < scattered(exact)
        if undesired_at == "highest":
            assert kept == DRAWS

    def test_ties(self):
        """Among equal scores the promise holds still: those at the threshold are released."""
        scores = np.repeat([0.0, 1.0], [10, 90])
        threshold = max_false_alarm(scores, 0.05, 0.95)
        assert threshold.value == 1.0
        assert not (scores > threshold.value).any()

    def test_survives_fp32(self):
        scores = np.random.default_rng(3).standard_normal(300).astype(np.float32)
        threshold = max_false_alarm(scores, 0.05, 0.95)
        assert np.float32(threshold.value) == threshold.value
        assert (scores > np.float32(threshold.value)).sum() == by_trying(300, 0.05, 0.95)

    def test_says_what_it_promises(self):
        promise = "at most 5 % of clean samples are blocked, with confidence 90 % over the draw of 100 {} samples that were not used in fitting"
        assert max_false_alarm(np.arange(100.0), 0.05, 0.9).promise == promise.format("clean")
        found = max_false_alarm(np.arange(100.0), 0.05, 0.9, max_prevalence=0.2).promise
        assert found == f"{promise.format('unmarked')}, if at most 20 % of what is drawn is undesired"


class TestMinRecall:
    @pytest.mark.parametrize("samples", [29, 100])
    def test_promise_is_kept_as_often_as_the_law_says(self, samples):
        random = np.random.default_rng(samples)
        taus = [min_recall(random.standard_normal(samples), 0.9, 0.95).value for _ in range(DRAWS)]
        exact = 1 - binom.cdf(by_trying(samples, 0.1, 0.95), samples, 0.1)
        assert exact >= 0.95
        assert abs(np.mean(norm.sf(taus) >= 0.9) - exact) < scattered(exact)

    @pytest.mark.parametrize(("dtype", "scale"), [(np.float32, 1e-30), (np.float64, 1.0), (np.float64, -1e30)])
    def test_the_mark_that_defines_it_is_blocked(self, dtype, scale):
        scores = (np.random.default_rng(1).standard_normal(100) * scale).astype(dtype)
        j = by_trying(100, 0.1, 0.95)
        threshold = min_recall(scores, 0.9, 0.95)
        assert np.float32(threshold.value) == threshold.value  # it is compared in fp32
        assert (scores > threshold.value).sum() == 100 - j
        assert (scores.astype(np.float32) > np.float32(threshold.value)).sum() == 100 - j

    def test_ties_are_blocked(self):
        scores = np.repeat([1.0, 2.0], [90, 10])
        assert (scores > min_recall(scores, 0.9, 0.95).value).all()

    def test_says_what_it_promises(self):
        assert min_recall(np.arange(50.0), 0.9, 0.95).promise == (
            "at least 90 % of undesired samples are blocked, with confidence 95 % over the draw of 50 undesired "
            "samples that were not used in fitting"
        )


def test_pooled_mean_counts_every_mark_once():
    threshold = pooled_mean(np.array([4.0, 5.0, 6.0]), np.array([1.0]))
    assert threshold == Threshold(4.0, "pooled_mean")
    assert threshold.promise is None


@pytest.mark.parametrize(
    "rule",
    [
        lambda scores: max_false_alarm(scores, 0.05, 0.95, concept="hats"),
        lambda scores: min_recall(scores, 0.9, 0.95, concept="hats"),
        lambda scores: pooled_mean(scores, np.zeros(3), concept="hats"),
        lambda scores: pooled_mean(np.zeros(3), scores, concept="hats"),
    ],
    ids=["max_false_alarm", "min_recall", "pooled undesired", "pooled clean"],
)
def test_scores_that_are_not_finite(rule):
    for bad in (np.nan, np.inf, -np.inf):
        scores = np.arange(100.0)
        scores[17] = bad
        with pytest.raises(ValueError, match=r"^hats: a score is not finite[^\n]*$"):
            rule(scores)
