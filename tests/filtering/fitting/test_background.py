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


def fed(part, values, sizes=(10**6,)):
    """The part after it has taken in the values in batches of these sizes, again and again."""
    begin = 0
    while begin < len(values):
        for size in sizes:
            part.update(values[begin : begin + size])
            begin += size
    return part


BATCHES = [(300,), (1,), (7,), (1, 0, 50, 2), (299, 1)]


class TestMoments:
    @pytest.mark.parametrize("sizes", BATCHES)
    def test_against_numpy(self, sizes):
        values = rows()
        moments = fed(Moments(4), values, sizes)
        assert moments.count == 300
        np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance, np.cov(values.T), rtol=1e-9)

    def test_far_from_zero(self):
        """Sums of squares would have lost every digit."""
        values = rows() + 1e8
        found = fed(Moments(4), values, (13,)).covariance
        np.testing.assert_allclose(found, np.cov((values - 1e8).T), rtol=1e-5)

    def test_one_row(self):
        assert not fed(Moments(4), rows(1)).covariance.any()


class TestReservoir:
    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any))
    def test_batches_do_not_matter(self, sizes):
        at_once, streamed = (fed(Reservoir(50, 4, seed=3), rows(), parts) for parts in ((300,), sizes))
        np.testing.assert_array_equal(at_once.rows, streamed.rows)
        assert at_once.seen == streamed.seen == 300
        assert (fed(Reservoir(50, 4, seed=4), rows()).rows != at_once.rows).any()

    def test_size(self):
        reservoir, values = Reservoir(50, 4, seed=0), rows()
        reservoir.update(values[:20])
        np.testing.assert_array_equal(reservoir.rows, values[:20].astype(np.float32))  # all while there is room
        assert reservoir.rows.dtype == np.float32
        fed(reservoir, values[20:], (33,))
        assert len(reservoir) == len(np.unique(reservoir.rows, axis=0)) == 50
        assert {row.tobytes() for row in reservoir.rows} <= {row.tobytes() for row in values.astype(np.float32)}

    def test_uniform(self):
        """How often each of 40 rows, in batches of 7, is among the 10 that stay, over 2,000 seeds."""
        values, counts = np.arange(40.0)[:, None], np.zeros(40)
        for seed in range(2000):
            counts[fed(Reservoir(10, 1, seed), values, (7,)).rows[:, 0].astype(int)] += 1
        assert counts.sum() == 20_000
        # Counts of a sample without replacement scatter a little less than chi-square has it.
        assert chisquare(counts).pvalue > 1e-3
        assert chisquare(counts).statistic > 10


def background(values, sizes=(10**6,), keep=1000, seed=5, covariance=True):
    return fed(Background(4, keep=keep, calibration_share=0.3, seed=seed, covariance=covariance), values, sizes)


class TestBackground:
    @pytest.mark.parametrize(("sizes", "keep"), [((1,), 20), ((7,), 1000), ((1, 0, 50, 2), 1000), ((299, 1), 20)])
    def test_batches_do_not_matter(self, sizes, keep):
        one, many = background(rows(), keep=keep), background(rows(), sizes, keep)
        np.testing.assert_array_equal(one.fitting.rows, many.fitting.rows)
        np.testing.assert_array_equal(one.calibration.rows, many.calibration.rows)
        np.testing.assert_allclose(one.moments.covariance, many.moments.covariance, rtol=1e-9)

    def test_every_row_is_in_one_of_two_parts(self):
        values, held = rows(2000), []
        for seed in (5, 6):
            parts = background(values, keep=2000, seed=seed)
            fitting, calibration = (
                {row.tobytes() for row in part.rows} for part in (parts.fitting, parts.calibration)
            )
            assert not fitting & calibration
            assert fitting | calibration == {row.tobytes() for row in values.astype(np.float32)}
            assert abs(len(calibration) - 600) < 5 * np.sqrt(2000 * 0.3 * 0.7)
            held.append(calibration)
        assert held[0] != held[1]

    def test_moments_are_of_all_that_is_fitted_and_of_nothing_else(self):
        everything, few = (background(rows(2000), keep=keep) for keep in (2000, 20))
        assert everything.moments.count == few.moments.count == few.fitting.seen
        np.testing.assert_allclose(everything.moments.covariance, np.cov(everything.fitting.rows.T), rtol=1e-4)
        np.testing.assert_allclose(few.moments.covariance, everything.moments.covariance)

    def test_without_covariance(self):
        parts = background(rows(), keep=5, covariance=False)
        assert parts.moments is None
        assert len(parts.fitting) == len(parts.calibration) == 5
