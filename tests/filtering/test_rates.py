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

    @given(SHARES, SHARES)
    def test_extremes(self, prevalence, rate):
        assert residual_rate(prevalence, 1, rate) == 0  # nothing undesired is left
        assume(rate < 0.999)
        assert residual_rate(prevalence, rate, rate) == pytest.approx(prevalence)  # nothing is told apart
        assert residual_rate(prevalence, 0, 0) == pytest.approx(prevalence)  # nothing is blocked
        assert release_rate(prevalence, rate, rate) == pytest.approx(1 - rate)

    def test_nothing_is_released(self):
        assert release_rate(0.3, 1, 1) == 0
        assert residual_rate(0.3, 1, 1) == 0
        assert residual_rate(1, 1, 0) == 0

    @given(SHARES, SHARES, SHARES)
    def test_prevalence_is_the_inverse(self, prevalence, recall, false_alarm):
        assume(recall - false_alarm > 1e-6)
        blocked = blocked_rate(prevalence, recall, false_alarm)
        assert prevalence_of(blocked, recall, false_alarm) == pytest.approx(prevalence, abs=1e-7)

    def test_prevalence_stays_a_share(self):
        assert prevalence_of(0.01, 0.9, 0.05) == 0
        assert prevalence_of(0.95, 0.9, 0.05) == 1

    @pytest.mark.parametrize("recall", [0.05, 0.01])
    def test_no_prevalence_where_nothing_is_told_apart(self, recall):
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
    @pytest.mark.parametrize(("count", "total"), [(0, 20), (1, 20), (7, 20), (20, 20), (50, 1000)])
    @pytest.mark.parametrize("confidence", [0.9, 0.95])
    def test_counted_is_clopper_pearson(self, count, total, confidence):
        rate, tail = Rate.counted(count, total, confidence), (1 - confidence) / 2
        assert rate.value == count / total
        assert rate.low == pytest.approx(beta.ppf(tail, count, total - count + 1) if count else 0)
        assert rate.high == pytest.approx(beta.isf(tail, count + 1, total - count) if count < total else 1)
        assert (rate.count, rate.total, rate.confidence) == (count, total, confidence)

    def test_of_none(self):
        assert Rate.counted(0, 0) is None

    def test_complement(self):
        rate, others = Rate.counted(3, 20), Rate.counted(17, 20)
        assert rate.complement.count == 17
        assert (rate.complement.value, rate.complement.low, rate.complement.high) == pytest.approx(
            (others.value, others.low, others.high)
        )
        assert Rate(0.2, 0.1, 0.4).complement.count is None

    def test_in_words(self):
        assert str(Rate.counted(20, 20)) == "100.0 % (83.2 to 100.0, 20 of 20)"
        assert str(Rate(0.1, 0.05, 0.2)) == "10.0 % (5.0 to 20.0)"


class TestIntervals:
    """What the three rates allow is all in the interval, and its ends are reached."""

    @settings(max_examples=300)
    @given(intervals(), intervals(), intervals())
    def test_release(self, prevalence, recall, false_alarm):
        rates, inside = zip(prevalence, recall, false_alarm, strict=True)
        released = release_of(*rates)
        assert released.value == pytest.approx(release_rate(*(rate.value for rate in rates)))
        assert in_between(released.value, released)
        assert in_between(release_rate(*inside), released)

    @settings(max_examples=300)
    @given(intervals(), intervals(), intervals())
    def test_residual(self, prevalence, recall, false_alarm):
        rates, inside = zip(prevalence, recall, false_alarm, strict=True)
        residual = residual_of(*rates)
        assert residual.value == pytest.approx(residual_rate(*(rate.value for rate in rates)))
        assert in_between(residual.value, residual)
        assume(release_rate(*inside) > 1e-6)
        assert in_between(residual_rate(*inside), residual)

    @settings(max_examples=300)
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
