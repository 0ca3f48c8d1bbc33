"""Accuracies against scikit-learn's confusion matrix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix

from hf_unlearn.metrics.classification import forget_retain_accuracy, per_class_accuracy


ANSWERS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=40).map(
    lambda pairs: tuple(np.array(pairs, dtype=int).reshape(-1, 2).T)
)


@settings(deadline=None)
@given(answers=ANSWERS, forgotten=st.sets(st.integers(0, 4)))
def test_are_the_diagonal_and_sums_over_rows(answers, forgotten):
    predictions, labels = answers
    matrix = confusion_matrix(labels, predictions, labels=range(5)) if len(labels) else np.zeros((5, 5))

    def accuracy(classes):
        total = matrix[classes].sum()
        return sum(matrix[c, c] for c in classes) / total if total else np.nan

    expected = [accuracy([c]) for c in range(5)]
    assert per_class_accuracy(predictions, labels, 5).tolist() == pytest.approx(expected, nan_ok=True)
    parts = sorted(forgotten), sorted(set(range(5)) - forgotten)
    expected = tuple(accuracy(part) for part in parts)
    assert forget_retain_accuracy(predictions, labels, forgotten) == pytest.approx(expected, nan_ok=True)


def test_lists_and_one_class():
    assert per_class_accuracy([0, 1, 1, 2], [0, 1, 2, 2], 4).tolist()[:3] == [1.0, 1.0, 0.5]
    assert forget_retain_accuracy([0, 1, 1, 2], [0, 1, 2, 2], [2]) == (0.5, 1.0)
    assert forget_retain_accuracy([3, 0], [3, 3], {3}) == pytest.approx((0.5, np.nan), nan_ok=True)
