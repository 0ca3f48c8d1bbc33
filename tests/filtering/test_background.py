"""Moments against numpy, and samples that do not depend on how their rows came."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from hf_unlearn.filtering.fitting.background import Background, Moments, Reservoir


def rows(count=300, dimension=4, seed=0):
    """Correlated, far from zero, each another."""
    random = np.random.default_rng(seed)
    return random.standard_normal((count, dimension)) @ random.standard_normal((dimension, dimension)) + 50


def in_batches(values, sizes):
    begin = 0
    while begin < len(values):
        for size in sizes:
            yield values[begin : begin + size]
            begin += size


BATCHES = [(300,), (1,), (7,), (1, 0, 50, 2), (299, 1)]


class TestMoments:
    @pytest.mark.parametrize("sizes", BATCHES)
    def test_against_numpy(self, sizes):
        values, moments = rows(), Moments(4)
        for batch in in_batches(values, sizes):
            moments.update(batch)
        assert moments.count == 300
        np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance, np.cov(values.T), rtol=1e-9)

    def test_far_from_zero(self):
        """Sums of squares would have lost every digit."""
        values, moments = rows() + 1e8, Moments(4)
        for batch in in_batches(values, (13,)):
            moments.update(batch)
        np.testing.assert_allclose(moments.covariance, np.cov((values - 1e8).T), rtol=1e-5)

    def test_one_row(self):
        moments = Moments(4)
        moments.update(rows(1))
        assert not moments.covariance.any()


class TestReservoir:
    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any))
    def test_batches_do_not_matter(self, sizes):
        values = rows()
        at_once, streamed = Reservoir(50, 4, seed=3), Reservoir(50, 4, seed=3)
        at_once.update(values)
        for batch in in_batches(values, sizes):
            streamed.update(batch)
        np.testing.assert_array_equal(at_once.rows, streamed.rows)
        assert at_once.seen == streamed.seen == 300

    def test_size(self):
        reservoir, values = Reservoir(50, 4, seed=0), rows()
        reservoir.update(values[:20])
        np.testing.assert_array_equal(reservoir.rows, values[:20].astype(np.float32))  # all while there is room
        assert reservoir.rows.dtype == np.float32
        for batch in in_batches(values[20:], (33,)):
            reservoir.update(batch)
            assert len(reservoir) <= 50
        assert len(reservoir) == len(np.unique(reservoir.rows, axis=0)) == 50
        assert {row.tobytes() for row in reservoir.rows} <= {row.tobytes() for row in values.astype(np.float32)}

    def test_another_seed_keeps_others(self):
        kept = []
        for seed in (0, 1):
            reservoir = Reservoir(50, 4, seed)
            reservoir.update(rows())
            kept.append(reservoir.rows)
        assert (kept[0] != kept[1]).any()

    def test_uniform(self):
        """How often each of 40 rows, in batches of 7, is among the 10 that stay, over 2,000 seeds."""
        values, counts = np.arange(40.0)[:, None], np.zeros(40)
        for seed in range(2000):
            reservoir = Reservoir(10, 1, seed)
            for batch in in_batches(values, (7,)):
                reservoir.update(batch)
            counts[reservoir.rows[:, 0].astype(int)] += 1
        assert counts.sum() == 20_000
        # Counts of a sample without replacement scatter a little less than chi-square has it.
        assert chisquare(counts).pvalue > 1e-3
        assert chisquare(counts).statistic > 10


class TestBackground:
    def background(self, batches, keep=1000, share=0.3, seed=5):
        background = Background(4, keep=keep, calibration_share=share, seed=seed, covariance=True)
        for batch in batches:
            background.update(batch)
        return background

    @pytest.mark.parametrize("sizes", BATCHES)
    @pytest.mark.parametrize("keep", [20, 1000])
    def test_batches_do_not_matter(self, sizes, keep):
        values = rows()
        one, many = self.background([values], keep), self.background(in_batches(values, sizes), keep)
        np.testing.assert_array_equal(one.fitting.rows, many.fitting.rows)
        np.testing.assert_array_equal(one.calibration.rows, many.calibration.rows)
        np.testing.assert_allclose(one.moments.covariance, many.moments.covariance, rtol=1e-9)

    def test_every_row_is_in_one_of_two_parts(self):
        values = rows(2000)
        background = self.background([values], keep=2000)
        fitting, held = ({row.tobytes() for row in part.rows} for part in (background.fitting, background.calibration))
        assert not fitting & held
        assert fitting | held == {row.tobytes() for row in values.astype(np.float32)}
        assert abs(len(held) - 600) < 5 * np.sqrt(2000 * 0.3 * 0.7)

    def test_moments_are_of_all_that_is_fitted_and_of_nothing_else(self):
        values = rows(2000)
        everything, few = self.background([values], keep=2000), self.background([values], keep=20)
        assert everything.moments.count == few.moments.count == few.fitting.seen
        np.testing.assert_allclose(everything.moments.covariance, np.cov(everything.fitting.rows.T), rtol=1e-4)
        np.testing.assert_allclose(few.moments.covariance, everything.moments.covariance)

    def test_seed(self):
        one, other = self.background([rows()]), self.background([rows()], seed=6)
        assert (
            one.calibration.rows.shape != other.calibration.rows.shape
            or (one.calibration.rows != other.calibration.rows).any()
        )

    def test_without_covariance(self):
        background = Background(4, keep=5, calibration_share=0.5, seed=0, covariance=False)
        background.update(rows())
        assert background.moments is None
        assert len(background.fitting) == len(background.calibration) == 5
