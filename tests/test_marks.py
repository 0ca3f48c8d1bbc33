"""What a few marks say about samples that nobody has looked at: of made-up kinds that overlap, and of real digits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_unlearn.images import grey_images
from hf_unlearn.unlearning.gan.feedback import FEWEST, spread_marks


def blobs(random, count, gap=0.0, width=4):
    """A Gaussian cloud of unit variance, `gap` away from the origin along the diagonal."""
    return random.normal(size=(count, width)) + gap / width**0.5


def ring(random, count, radius=3.0, width=4):
    points = random.normal(size=(count, width))
    return radius * points / np.linalg.norm(points, axis=1, keepdims=True)


def kinds(seed=0, marks=60, others=100, gap=2.0):
    """`(negatives, positives, others)`; of the last, the first half are negatives."""
    random = np.random.default_rng(seed)
    marked = blobs(random, marks), blobs(random, marks, gap)
    return *marked, np.concatenate([blobs(random, others), blobs(random, others, gap)])


class TestSpreadMarks:
    @pytest.mark.parametrize("miss_rate", [0.01, 0.05, 0.3])
    @pytest.mark.parametrize("marks", [FEWEST, 12, 60])
    def test_kinds_that_lie_apart_are_told_apart(self, marks, miss_rate):
        result = spread_marks(*kinds(marks=marks, gap=20), miss_rate=miss_rate)
        assert result.negative.dtype == result.positive.dtype == bool
        assert result.negative.shape == result.positive.shape == (200,)
        assert (result.negative == (np.arange(200) < 100)).all()
        assert (result.positive == ~result.negative).all()
        assert (result.low, result.high, result.missed) == (0, 0, 0)

    def test_few_negatives_count_as_much_as_many_positives(self):
        """Marks come as they are drawn: what to forget is rare. Without weights 0.25 of the positives were kept."""
        found = []
        for seed in range(8):
            random = np.random.default_rng(seed)
            others = np.concatenate([blobs(random, 500), blobs(random, 500, 3)])
            result = spread_marks(blobs(random, 20), blobs(random, 400, 3), others)
            found.append((result.negative[:500].mean(), result.positive[500:].mean(), result.positive[:500].mean()))
        recall, kept, passed = np.mean(found, 0)
        assert recall > 0.1  # few, so that they are right
        assert kept > 0.6
        assert passed < 0.1

    def test_kinds_that_no_plane_parts(self):
        random = np.random.default_rng(0)
        others = np.concatenate([blobs(random, 300) / 3, ring(random, 300)])
        result = spread_marks(blobs(random, 40) / 3, ring(random, 40), others)
        assert result.negative[:300].mean() > 0.97
        assert result.positive[300:].mean() > 0.97

    @pytest.mark.parametrize("miss_rate", [0.02, 0.05, 0.15])
    def test_of_fresh_negatives_about_the_miss_rate_pass(self, miss_rate):
        """With 200 marks of kinds that overlap, averaged over draws; each of these is off by a few hundredths."""
        passed, missed, found = [], [], []
        for seed in range(12):
            result = spread_marks(*kinds(seed, marks=200, others=1000, gap=1.5), miss_rate=miss_rate)
            assert result.low < 0
            passed.append(result.positive[:1000].mean())
            missed.append(result.missed)
            found.append(result.positive[1000:].mean())
        assert 0.6 * miss_rate < np.mean(passed) < 1.5 * miss_rate
        np.testing.assert_allclose(missed, miss_rate, atol=1 / 200)
        assert np.mean(found) > 5 * np.mean(passed) or miss_rate > 0.1

    def test_where_the_boundary_itself_misses_fewer_it_is_the_margin(self):
        """However many may pass, what lies on the negatives' side is never a positive."""
        result = spread_marks(*kinds(marks=200, others=1000, gap=3.0), miss_rate=0.5)
        assert result.low == result.high == 0
        assert 0.02 < result.missed < 0.15
        assert (result.positive == ~result.negative).all()
        assert result.positive[:1000].mean() < 0.15

    @settings(deadline=None, max_examples=25)
    @given(
        seed=st.integers(0, 10**6),
        marks=st.integers(FEWEST, 30),
        gap=st.floats(0, 5),
        rates=st.lists(st.floats(0.01, 0.99), min_size=2, max_size=2).map(sorted),
    )
    def test_positives_of_a_smaller_rate_are_among_those_of_a_larger(self, seed, marks, gap, rates):
        strict, lax = (spread_marks(*kinds(seed, marks, 50, gap), miss_rate=rate) for rate in rates)
        assert (strict.positive <= lax.positive).all()
        assert (strict.negative <= lax.negative).all()
        assert strict.low <= lax.low <= 0 <= lax.high <= strict.high
        assert 0 <= strict.missed <= lax.missed <= 1
        assert not (lax.positive & lax.negative).any()

    def test_what_is_called_negative_is_seldom_positive(self):
        """Positives are many: without a margin of their own a few in a hundred of them would be as many as all negatives."""
        called, careless = [], []
        for seed in range(12):
            random = np.random.default_rng(seed)
            marked = blobs(random, 100), blobs(random, 900, 2)
            others = np.concatenate([blobs(random, 500), blobs(random, 4500, 2)])
            result, lax = (spread_marks(*marked, others, miss_rate=rate) for rate in (0.05, 0.9))
            called.append(result.negative[500:].sum() / 500)
            careless.append(lax.negative[500:].sum() / 500)
        assert np.mean(called) < 0.1
        assert np.mean(careless) > 0.5

    def test_of_the_marks_themselves_no_more_than_the_rate_pass(self):
        for marks in (FEWEST, 10, 15, 30):
            for seed in range(5):
                assert spread_marks(*kinds(seed, marks, gap=1.0), miss_rate=0.05).missed <= 0.05

    @settings(deadline=None, max_examples=25)
    @given(seed=st.integers(0, 10**6), unit=st.floats(1e-3, 1e3), shift=st.floats(-10, 10))
    def test_features_have_no_unit_and_no_origin(self, seed, unit, shift):
        parts = kinds(seed)
        plain, other = spread_marks(*parts), spread_marks(*(unit * (part + shift) for part in parts))
        # Verdicts right at a boundary may be rounded to either side.
        assert (plain.negative != other.negative).mean() <= 0.01
        assert (plain.positive != other.positive).mean() <= 0.01
        assert other.low == pytest.approx(plain.low, abs=1e-2)

    def test_features_may_each_have_an_origin_of_their_own(self):
        """As pixels have: those of a black margin say nothing, and must not make all others look alike."""
        random = np.random.default_rng(0)
        others = np.concatenate([blobs(random, 300) / 3, ring(random, 300)])
        parts = blobs(random, 40) / 3, ring(random, 40), others
        plain = spread_marks(*parts)
        other = spread_marks(*(part + np.array([100, 0, -100, 0]) for part in parts))
        assert (plain.negative != other.negative).mean() <= 0.01
        assert (plain.positive != other.positive).mean() <= 0.01

    @pytest.mark.parametrize("seed", [0, 1])
    def test_a_verdict_depends_on_the_marks_alone(self, seed):
        negatives, positives, others = kinds(seed)
        whole = spread_marks(negatives, positives, others)
        some = np.random.default_rng(seed).permutation(200)[:30]
        part = spread_marks(negatives, positives, others[some])
        assert (part.negative == whole.negative[some]).all()
        assert (part.positive == whole.positive[some]).all()
        assert (part.low, part.high, part.missed) == (whole.low, whole.high, whole.missed)

    def test_kinds_can_be_exchanged(self):
        negatives, positives, others = kinds()
        one, other = spread_marks(negatives, positives, others), spread_marks(positives, negatives, others)
        assert (one.negative == other.positive).mean() > 0.9
        assert (one.positive == other.negative).mean() > 0.9

    def test_is_given_by_the_seed_of_the_folds(self):
        parts = kinds(gap=1.0)
        results = [spread_marks(*parts, seed=seed) for seed in (3, 3, 0, 1, 2)]
        assert results[0].low == results[1].low
        assert (results[0].positive == results[1].positive).all()
        assert len({result.low for result in results}) == 4

    def test_the_given_arrays_are_left_alone(self):
        parts = [part.astype(np.float32) for part in kinds()]
        copies = [part.copy() for part in parts]
        spread_marks(*parts)
        assert all((part == copy).all() for part, copy in zip(parts, copies, strict=True))

    @pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
    def test_features_that_say_nothing_do_not_crash(self, value):
        same = np.full((8, 3), value)
        result = spread_marks(same, same, same)
        assert result.negative.shape == result.positive.shape == (8,)
        assert len(set(result.negative)) == len(set(result.positive)) == 1
        assert np.isfinite([result.low, result.high, result.missed]).all()

    @pytest.mark.parametrize("counts", [(FEWEST - 1, 50), (50, FEWEST - 1), (0, 50), (50, 0)])
    def test_refuses_too_few_marks(self, counts):
        random = np.random.default_rng(0)
        with pytest.raises(ValueError, match=f"^negatives, positives: {counts[0]} and {counts[1]} marks") as error:
            spread_marks(blobs(random, counts[0]), blobs(random, counts[1], 5), blobs(random, 3))
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 2.0, float("nan")])
    def test_refuses_what_is_no_rate(self, rate):
        with pytest.raises(ValueError, match="^miss_rate="):
            spread_marks(*kinds(), miss_rate=rate)


@pytest.fixture(scope="module")
def digit_images(digits):
    rows = digits["train"].shuffle(seed=0)
    return grey_images(rows, 8).flatten(1).numpy(), np.array(rows["label"])


class TestDigits:
    def test_twenty_marked_digits_find_the_others(self, digit_images):
        images, labels = digit_images
        figures = []
        for digit in range(10):
            negatives, positives = np.flatnonzero(labels == digit)[:20], np.flatnonzero(labels != digit)[:180]
            rest = np.setdiff1d(np.arange(len(labels)), np.concatenate([negatives, positives]))
            result = spread_marks(images[negatives], images[positives], images[rest])
            true = labels[rest] == digit
            assert 80 < true.sum() < 95
            assert result.missed <= 0.05
            precision = true[result.negative].mean()
            figures.append(
                (
                    result.negative[true].mean(),
                    precision,
                    1 - result.positive[true].mean(),
                    result.positive[~true].mean(),
                )
            )
        recall, precision, held_back, kept = zip(*figures, strict=True)
        assert np.mean(recall) > 0.89
        assert np.mean(precision) > 0.95
        assert np.mean(held_back) > 0.92  # negatives that do not pass for positive
        assert np.mean(kept) > 0.94
        assert np.min(figures) > 0.78
