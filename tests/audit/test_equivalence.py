import math

import numpy as np
import pytest
from scipy import stats

from hf_unlearn.audit.check import Reading, Readings, against_others
from hf_unlearn.audit.equivalence import CONFIDENCE, allowed, compared, equivalent, sampling_error


def plain(value):
    return Reading(float(value), error=0.0, n=100)


def around(mean, spread, count):
    """So many readings with this mean and sample standard deviation."""
    z = np.linspace(-1, 1, count)
    return tuple(plain(mean + spread * value / z.std(ddof=1)) for value in z)


class TestMargin:
    @pytest.mark.parametrize("references", [3, 6, 20])
    def test_one_more_retrained_model_is_within_all_margins_in_95_of_100(self, references):
        """K independent checks: exactly (1 − α/K)^K by construction, whatever the spread."""
        checks, audits, random = 12, 3000, np.random.default_rng(references)
        values = random.normal(size=(audits, checks, references + 1))
        statuses = np.array(
            [
                [
                    compared(Readings(plain(one[0]), None, tuple(map(plain, one[1:]))), 0.0, checks).status
                    for one in every
                ]
                for every in values[:60]
            ]
        )
        assert (statuses == "beyond").any(1).sum() <= 3
        # The same rule on many more audits at once: 3 standard errors of 3000 audits are 0.012.
        audited, others = values[..., 0], values[..., 1:]
        spread, distance = others.std(-1, ddof=1), audited - others.mean(-1)
        high = distance + stats.t.ppf(CONFIDENCE, references - 1) * spread / math.sqrt(references)
        within = high <= spread * allowed(1.0, references, checks)
        np.testing.assert_array_equal((statuses == "blind") | (statuses == "within"), within[:60])
        assert within.all(1).mean() == pytest.approx((1 - 0.05 / checks) ** checks, abs=0.012)

    def test_in_closed_form(self):
        """Two references: t with one degree of freedom is Cauchy's law, whose quantiles are tangents."""
        beyond, mean = math.tan(math.pi * (0.5 - 0.05 / 4)), math.tan(math.pi * 0.45)
        assert allowed(2.0, 2, 4) == pytest.approx(2 * (beyond * math.sqrt(1.5) + mean / math.sqrt(2)))

    def test_it_is_the_stated_one_where_retrained_models_agree(self):
        found = compared(Readings(plain(0.3), plain(1.0), (plain(0.2),) * 3), 0.05, 10)
        assert (found.status, found.sees) == ("beyond", True)
        assert found.margin == pytest.approx(0.05)
        assert (found.distance, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


class TestStatus:
    def of(self, value, original, spread=0.01, references=5):
        return compared(Readings(plain(value), plain(original), around(0.5, spread, references)), 0.05, 10)

    def test_beyond_within_and_between(self):
        margin = 0.05 + allowed(0.01, 5, 10)
        half = stats.t.ppf(0.95, 4) * 0.01 / math.sqrt(5)
        assert self.of(0.5 + margin + half + 1e-6, 0.9).status == "beyond"
        for inside in (-0.9, 0.0, 0.9):  # of the interval's half
            assert self.of(0.5 + margin + inside * half, 0.9).status == "unclear"
        assert self.of(0.5 + margin - half - 1e-6, 0.9).status == "within"
        assert self.of(0.0, 0.9).status == "within"  # less memory than a retrained model is no memory

    def test_a_margin_that_hides_the_original_is_not_passed(self):
        assert allowed(0.05, 3, 10) > 0.4
        hidden = self.of(0.5, 0.9, spread=0.05, references=3)
        assert (hidden.status, hidden.sees) == ("blind", False)
        assert self.of(0.5, 0.9, spread=0.05, references=40).status == "within"
        # There is nothing to hide where the original itself lies among retrained models: 0.05 + 2.58 · 0.05 at the corrected level.
        assert [self.of(0.5, 0.5 + d, spread=0.05, references=3).status for d in (0.17, 0.19)] == ["within", "blind"]
        assert self.of(0.5, 0.52, spread=0.05, references=3).status == "within"

    def test_without_the_original_a_margin_may_not_be_wider_than_twice_what_was_stated(self):
        for spread, status in ((0.001, "within"), (0.05, "blind")):
            found = compared(Readings(plain(0.5), None, around(0.5, spread, 5)), 0.05, 10)
            assert (found.status, found.sees) == (status, False)

    @pytest.mark.parametrize("references", [(), (plain(0.0),)])
    def test_below_two_references_memory_is_seen_where_a_stranger_would_have_none(self, references):
        right = Reading.mean_of([1.0] * 30 + [0.0] * 70)
        found = compared(Readings(right, right, references), 0.05, 10, never_seen=0.0)
        assert (found.status, found.margin, found.distance) == ("beyond", 0.05, 0.3)
        assert (
            compared(Readings(Reading.mean_of([0.0] * 100), right, references), 0.05, 10, never_seen=0.0).status
            == "unknown"
        )
        assert compared(Readings(right, right, references), 0.05, 10).status == "unknown"


class TestSamplingError:
    def test_none_of_n_right_is_the_closed_form(self):
        nothing = Reading.mean_of(np.zeros(50))
        down, up = sampling_error(nothing, [nothing] * 3)
        assert down == 0
        assert up == pytest.approx(1 - 0.05 ** (1 / 50))

    def test_clopper_pearson_against_the_beta_law(self):
        found = sampling_error(Reading.mean_of([1.0] * 7 + [0.0] * 33), ())
        low, high = stats.beta.ppf(0.05, 7, 34), stats.beta.ppf(0.95, 8, 33)
        assert found == pytest.approx((7 / 40 - low, high - 7 / 40))

    def test_models_that_err_on_the_same_rows_are_compared_more_sharply(self):
        random = np.random.default_rng(0)
        hard = random.random(200) < 0.4
        audited = Reading.mean_of(hard.astype(float))
        alike = Reading.mean_of(np.where(random.random(200) < 0.05, ~hard, hard).astype(float))
        other = Reading.mean_of(random.permutation(hard).astype(float))
        assert sampling_error(audited, [alike])[1] < 0.5 * sampling_error(audited, ())[1]
        # Of two models that err independently the difference varies as two do.
        assert sampling_error(audited, [other])[1] == pytest.approx(
            math.sqrt(2) * sampling_error(audited, ())[1], rel=0.1
        )

    def test_means_of_other_values_are_paired(self):
        random = np.random.default_rng(1)
        base, shift = random.normal(size=80), random.normal(size=80) / 10
        found = sampling_error(Reading.mean_of(base + shift), [Reading.mean_of(base)] * 2)
        expected = stats.ttest_rel(base + shift, base).confidence_interval(0.9)
        assert found[0] == pytest.approx((expected.high - expected.low) / 2)

    def test_what_is_no_mean_brings_its_own_error(self):
        one = Reading(0.6, error=0.03, n=50)
        assert sampling_error(one, [Reading(0.5, error=0.04)])[0] == pytest.approx(stats.norm.ppf(0.95) * 0.05)

    def test_bounds_hold_with_both_sources_of_error(self):
        """Audited and retrained models of one law of models, asked other rows each time: each bound fails in about 5 of 100."""
        random, failed, audits = np.random.default_rng(2), np.zeros(2), 300
        for _ in range(audits):
            levels = random.normal(0, 0.2, 5)  # of each model: what few references leave open
            rows = random.normal(0, 0.5, 40)
            readings = [Reading.mean_of(level + rows + random.normal(0, 0.3, 40)) for level in (0.0, *levels)]
            found = compared(Readings(readings[0], None, tuple(readings[1:])), 0.1, 5)
            failed += found.low > 0, found.high < 0
        assert (failed / audits < 0.05 + 3 * math.sqrt(0.05 * 0.95 / audits)).all()
        assert (failed / audits > 0.005).all()  # and not because the interval is endless

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_what_is_not_finite_is_no_reading(self, value):
        with pytest.raises(ValueError, match="not finite"):
            Reading.mean_of([0.0, value])
        with pytest.raises(ValueError, match="not finite"):
            Reading.mean_of([])


def test_equivalent():
    right = np.arange(100) < 50
    one = Reading.mean_of(right.astype(float))
    assert equivalent(one, one, 0.1)  # the same rows
    assert not equivalent(one, Reading.mean_of(np.roll(right, 30).astype(float)), 0.1)  # as many, but others
    assert not equivalent(one, Reading.mean_of((np.arange(100) < 45).astype(float)), 0.04)


def test_against_others_leaves_each_model_out_of_its_own_references():
    readings = Readings(plain(10), plain(20), tuple(map(plain, (1, 2, 4))))
    found = against_others(readings, lambda one, others: plain(one.value - sum(other.value for other in others)))
    assert [one.value for one in found.retrained] == [1 - 6, 2 - 5, 4 - 3]
    assert (found.audited.value, found.original.value) == (
        10 - 3,
        20 - 3,
    )  # of as many references as each retrained one


class TestKnownByConstruction:
    def test_interval_is_students_and_the_margin_the_stated_one(self):
        """Of a mean of 4 pairs with its standard error; retrained models need not be asked, and have no spread."""
        values = np.array([0.55, 0.6, 0.5, 0.59])
        error = float(values.std(ddof=1) / 2)
        reading = Reading(float(values.mean()), error=error, freedom=3, n=4)
        found = compared(Readings(reading, plain(0.9)), 0.1, 20, by_construction=0.5)
        low, high = stats.t(3, values.mean(), error).interval(2 * CONFIDENCE - 1)
        assert (found.low, found.high) == pytest.approx((low - 0.5, high - 0.5))
        assert (found.margin, found.sees, found.status) == (0.1, True, "unclear")
        assert compared(Readings(reading, plain(0.55)), 0.2, 20, by_construction=0.5).status == "within"
        assert not compared(Readings(reading, plain(0.55)), 0.2, 20, by_construction=0.5).sees
        assert compared(Readings(reading), 0.0001, 20, by_construction=0.5).status == "beyond"
