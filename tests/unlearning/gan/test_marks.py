"""What a few marks say about samples that nobody has looked at: of made-up kinds that overlap, and of real digits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC

from hf_unlearn.images import grey_images
from hf_unlearn.unlearning.gan.feedback import FEWEST, spread_marks


def blobs(random, count, gap=0.0, width=4):
    """A Gaussian cloud of unit variance, `gap` away from the origin along the diagonal."""
    return random.normal(size=(count, width)) + gap / width**0.5


def kinds(seed=0, marks=60, others=100, gap=2.0, clean=None):
    """`(undesired, clean, others)`; of the last, the first half are undesired."""
    random = np.random.default_rng(seed)
    marked = blobs(random, marks), blobs(random, clean or marks, gap)
    return *marked, np.concatenate([blobs(random, others), blobs(random, others, gap)])


class TestSpreadMarks:
    @pytest.mark.parametrize(("marks", "miss_rate"), [(FEWEST, 0.01), (12, 0.3), (60, 0.05)])
    def test_kinds_that_lie_apart_are_told_apart(self, marks, miss_rate):
        result = spread_marks(*kinds(marks=marks, gap=20), miss_rate=miss_rate)
        assert result.negative.dtype == result.positive.dtype == bool
        assert (result.negative == (np.arange(200) < 100)).all()
        assert (result.positive == ~result.negative).all()
        assert (result.low, result.high, result.missed) == (0, 0, 0)

    @pytest.mark.parametrize(
        ("marks", "clean", "gap", "miss_rate", "unit", "origin"),
        [
            (20, 180, 2.0, 0.1, 1.0, 0.0),
            (180, 20, 2.0, 0.05, 1e-3, 0.0),
            (FEWEST, 50, 1.0, 0.05, 1e3, -7.0),
            (60, 60, 1.5, 0.2, 1.0, [100, 0, -100, 0]),
            (60, 60, 3.0, 0.6, 1.0, 0.0),
        ],
    )
    def test_second_implementation(self, marks, clean, gap, miss_rate, unit, origin):
        """Fold by fold, with weights and kernel written out, and every sample for itself; of both kinds so many may be wrong,
        and not one fewer. Features may have any unit and an origin each.
        """
        plain = kinds(3, marks, gap=gap, clean=clean)
        parts = [unit * (part + origin) for part in plain]
        copies = [part.copy() for part in parts]
        x = np.concatenate(plain[:2])
        others = (plain[2] - x.mean(0)) / (x - x.mean(0)).std()
        x = (x - x.mean(0)) / (x - x.mean(0)).std()
        y = np.array([1] * marks + [0] * clean)

        def scores(rows, new):
            weights = {kind: len(rows) / (2 * (y[rows] == kind).sum()) for kind in (0, 1)}
            kernel = np.exp(-((x[rows][:, None] - x[rows]) ** 2).sum(2) / 4)
            other = np.exp(-((new[:, None] - x[rows]) ** 2).sum(2) / 4)
            return SVC(C=10, kernel="precomputed", class_weight=weights).fit(kernel, y[rows]).decision_function(other)

        unseen = np.zeros(len(x))
        folds = min(10, marks, clean)
        for rows, left_out in StratifiedKFold(folds, shuffle=True, random_state=5).split(x, y):
            unseen[left_out] = scores(rows, x[left_out])
        result = spread_marks(*parts, miss_rate=miss_rate, seed=5)
        assert all((part == copy).all() for part, copy in zip(parts, copies, strict=True))
        allowed = int(miss_rate * marks)
        near = 5e-3  # the solver stops at 1e-3
        below, above = unseen[:marks], unseen[marks:]
        assert result.low <= 0 <= result.high
        assert (below < result.low - near).sum() <= allowed
        assert result.low == 0 or (below <= result.low + near).sum() > allowed
        assert (above >= result.high + near).sum() <= allowed
        assert result.high == 0 or (above >= result.high - near).sum() > allowed
        assert result.missed * marks == pytest.approx((below < result.low).sum(), abs=1)
        final = scores(np.arange(len(x)), others)
        clear = (np.abs(final - result.low) > near) & (np.abs(final - result.high) > near)
        assert clear.mean() > 0.9
        assert (result.negative == (final >= result.high))[clear].all()
        assert (result.positive == (final < result.low))[clear].all()

    def test_of_fresh_negatives_about_the_miss_rate_pass(self):
        """With 200 marks of kinds that overlap, averaged over draws; each of these is off by a few hundredths."""
        passed, found = [], []
        for seed in range(6):
            result = spread_marks(*kinds(seed, marks=200, others=1000, gap=1.5), miss_rate=0.05)
            assert result.low < 0
            passed.append(result.positive[:1000].mean())
            found.append(result.positive[1000:].mean())
            assert result.missed == pytest.approx(0.05)
        assert 0.02 < np.mean(passed) < 0.08  # 0.050 ± 0.006, seeds given
        assert np.mean(found) > 0.2  # 0.28

    @settings(deadline=None, max_examples=15)
    @given(
        seed=st.integers(0, 10**6), marks=st.integers(FEWEST, 30), gap=st.floats(0, 5),
        rates=st.lists(st.floats(0.01, 0.99), min_size=2, max_size=2).map(sorted),
    )  # fmt: skip
    def test_positives_of_a_smaller_rate_are_among_those_of_a_larger(self, seed, marks, gap, rates):
        strict, lax = (spread_marks(*kinds(seed, marks, 50, gap), miss_rate=rate) for rate in rates)
        assert (strict.positive <= lax.positive).all()
        assert (strict.negative <= lax.negative).all()
        assert strict.low <= lax.low <= 0 <= lax.high <= strict.high
        assert 0 <= strict.missed <= lax.missed <= 1
        assert strict.missed <= rates[0]
        assert not (lax.positive & lax.negative).any()

    @pytest.mark.parametrize("value", [0.0, 0.1])
    def test_features_that_say_nothing_do_not_crash(self, value):
        same = np.full((8, 3), value)
        result = spread_marks(same, same, same)
        assert result.negative.shape == result.positive.shape == (8,)
        assert len(set(result.negative)) == len(set(result.positive)) == 1
        assert np.isfinite([result.low, result.high, result.missed]).all()

    @pytest.mark.parametrize(
        ("counts", "rate", "match"),
        [
            ((FEWEST - 1, 50), 0.05, "^undesired, clean: 4 and 50 marks"),
            ((50, FEWEST - 1), 0.05, "^undesired, clean: 50 and 4 marks"),
            ((0, 50), 0.05, "^undesired, clean: 0 and 50 marks"),
            *(((50, 50), rate, "^miss_rate=") for rate in (0.0, 1.0, -0.1, float("nan"))),
        ],
    )
    def test_refuses(self, counts, rate, match):
        random = np.random.default_rng(0)
        with pytest.raises(ValueError, match=match) as error:
            spread_marks(*(blobs(random, count) for count in counts), blobs(random, 3), miss_rate=rate)
        assert "\n" not in str(error.value)


def test_twenty_marked_digits_find_the_others(digits):
    rows = digits["train"].shuffle(seed=0)
    images, labels = grey_images(rows, 8).flatten(1).numpy(), np.array(rows["label"])
    figures = []
    for digit in range(10):
        undesired, clean = np.flatnonzero(labels == digit)[:20], np.flatnonzero(labels != digit)[:180]
        rest = np.setdiff1d(np.arange(len(labels)), np.concatenate([undesired, clean]))
        result = spread_marks(images[undesired], images[clean], images[rest])
        true = labels[rest] == digit
        assert result.missed <= 0.05
        # Found, rightly so, held back (undesired that do not pass for positive), kept.
        shares = result.negative[true], true[result.negative], ~result.positive[true], result.positive[~true]
        figures.append([share.mean() for share in shares])
    # 0.914, 0.988, 0.949, 0.995 of 1,300 digits, and the least of all 0.83; a verdict at a boundary is a thousandth
    assert (np.mean(figures, 0) > [0.89, 0.95, 0.92, 0.94]).all()
    assert np.min(figures) > 0.78
