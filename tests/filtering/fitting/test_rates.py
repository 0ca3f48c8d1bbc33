"""Rates against counting in a population, and intervals against everything that lies in them."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from hf_unlearn.filtering.fitting.rates import (
    Rate,
    blocked_rate,
    prevalence_from,
    prevalence_of,
    release_of,
    release_rate,
    residual_of,
    residual_rate,
)


SHARES = st.floats(0, 1)


@st.composite
def intervals(draw):
    """A rate, and a value that it allows."""
    low, value, high = sorted(draw(st.tuples(SHARES, SHARES, SHARES)))
    inside = low + draw(SHARES) * (high - low)
    return Rate(value, low, high), min(max(inside, low), high)


def in_between(value, rate):
    return rate.low - 1e-9 <= value <= rate.high + 1e-9


class TestFormulas:
    def test_against_counting(self):
        random = np.random.default_rng(0)
        undesired = random.random(1000) < 0.3
        blocked = random.random(1000) < np.where(undesired, 0.8, 0.1)
        rates = undesired.mean(), blocked[undesired].mean(), blocked[~undesired].mean()
        assert blocked_rate(*rates) == pytest.approx(blocked.mean())
        assert release_rate(*rates) == pytest.approx(1 - blocked.mean())
        assert residual_rate(*rates) == pytest.approx(undesired[~blocked].mean())
        assert prevalence_of(blocked.mean(), *rates[1:]) == pytest.approx(undesired.mean())

    def test_nothing_is_released(self):
        assert release_rate(0.3, 1, 1) == residual_rate(0.3, 1, 1) == residual_rate(1, 1, 0) == 0

    @given(SHARES, SHARES, SHARES)
    def test_prevalence_is_the_inverse(self, prevalence, recall, false_alarm):
        assume(recall - false_alarm > 1e-6)
        blocked = blocked_rate(prevalence, recall, false_alarm)
        assert prevalence_of(blocked, recall, false_alarm) == pytest.approx(prevalence, abs=1e-7)

    def test_prevalence_stays_a_share_where_there_is_one(self):
        assert prevalence_of(0.01, 0.9, 0.05) == 0
        assert prevalence_of(0.95, 0.9, 0.05) == 1
        for recall in (0.05, 0.01):
            with pytest.raises(ValueError, match=rf"^recall={recall}: not above false_alarm=0.05[^\n]*$"):
                prevalence_of(0.05, recall, 0.05)

    @given(SHARES, SHARES, SHARES, SHARES)
    def test_residual_rises_with_prevalence_and_false_alarms_and_falls_with_recall(self, one, two, three, four):
        low, high = min(one, two), max(one, two)
        assume(high < 0.999999)  # at 1 nothing is released: 0 by definition
        slack = 1e-9
        assert residual_rate(low, three, four) <= residual_rate(high, three, four) + slack or four > 0.999999
        assert residual_rate(three, high, four) <= residual_rate(three, low, four) + slack
        assert residual_rate(three, four, low) <= residual_rate(three, four, high) + slack


class TestRate:
    @pytest.mark.parametrize(
        ("count", "total", "confidence"), [(0, 20, 0.9), (1, 20, 0.95), (20, 20, 0.95), (50, 1000, 0.9)]
    )
    def test_counted_is_clopper_pearson(self, count, total, confidence):
        rate, tail = Rate.counted(count, total, confidence), (1 - confidence) / 2
        assert rate.value == count / total
        assert rate.low == pytest.approx(beta.ppf(tail, count, total - count + 1) if count else 0)
        assert rate.high == pytest.approx(beta.isf(tail, count + 1, total - count) if count < total else 1)
        assert (rate.count, rate.total, rate.confidence) == (count, total, confidence)
        others = Rate.counted(total - count, total, confidence)
        complement = rate.complement
        assert complement.count == others.count
        found, expected = ((one.value, one.low, one.high) for one in (complement, others))
        assert found == pytest.approx(expected)

    def test_without_counts(self):
        assert Rate.counted(0, 0) is None
        assert Rate(0.2, 0.1, 0.4).complement.count is None
        assert Rate.counted(3, 20).confidence == 0.95

    def test_in_words(self):
        assert str(Rate.counted(20, 20)) == "100.0 % (83.2 to 100.0, 20 of 20)"
        assert str(Rate(0.1, 0.05, 0.2)) == "10.0 % (5.0 to 20.0)"


class TestIntervals:
    """What the three rates allow is all in the interval, and its ends are reached."""

    @pytest.mark.parametrize(("of", "formula"), [(release_of, release_rate), (residual_of, residual_rate)])
    @settings(max_examples=200)
    @given(intervals(), intervals(), intervals())
    def test_release_and_residual(self, of, formula, prevalence, recall, false_alarm):
        rates, inside = zip(prevalence, recall, false_alarm, strict=True)
        found = of(*rates)
        assert found.value == pytest.approx(formula(*(rate.value for rate in rates)))
        assert in_between(found.value, found)
        assume(formula is release_rate or release_rate(*inside) > 1e-6)
        assert in_between(formula(*inside), found)

    @settings(max_examples=200)
    @given(intervals(), intervals(), intervals())
    def test_prevalence(self, blocked, recall, false_alarm):
        rates, inside = zip(blocked, recall, false_alarm, strict=True)
        prevalence = prevalence_from(*rates)
        if rates[1].value <= rates[2].value:
            assert prevalence is None
            return
        assert prevalence.value == pytest.approx(prevalence_of(*(rate.value for rate in rates)))
        assert in_between(prevalence.value, prevalence)
        assume(inside[1] - inside[2] > 1e-6)
        assert in_between(prevalence_of(*inside), prevalence)

    def test_ends_are_reached(self):
        """None is wider than it must be: every end is the value at a corner."""
        blocked, recall = Rate(0.2, 0.15, 0.25), Rate(0.8, 0.7, 0.9)
        false_alarm, prevalence = Rate(0.05, 0.02, 0.1), Rate(0.2, 0.1, 0.3)
        for interval, formula, first in (
            (release_of(prevalence, recall, false_alarm), release_rate, prevalence),
            (residual_of(prevalence, recall, false_alarm), residual_rate, prevalence),
            (prevalence_from(blocked, recall, false_alarm), prevalence_of, blocked),
        ):
            corners = [
                formula(one, two, three)
                for one in (first.low, first.high)
                for two in (recall.low, recall.high)
                for three in (false_alarm.low, false_alarm.high)
            ]
            assert (interval.low, interval.high) == pytest.approx((min(corners), max(corners)))
