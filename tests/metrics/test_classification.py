import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix

from hf_unlearn.metrics.classification import forget_retain_accuracy, per_class_accuracy


ANSWERS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=40).map(
    lambda pairs: tuple(np.array(pairs, dtype=int).reshape(-1, 2).T)
)


@given(answers=ANSWERS)
def test_per_class_accuracy_is_the_confusion_matrix_diagonal(answers):
    predictions, labels = answers
    actual = per_class_accuracy(predictions, labels, 5)
    matrix = confusion_matrix(labels, predictions, labels=range(5)) if len(labels) else np.zeros((5, 5))
    for c in range(5):
        if matrix[c].sum():
            assert actual[c] == matrix[c, c] / matrix[c].sum()
        else:
            assert np.isnan(actual[c])


@given(answers=ANSWERS, forgotten=st.sets(st.integers(0, 4)))
def test_forget_and_retain_accuracy_are_sums_over_its_rows(answers, forgotten):
    predictions, labels = answers
    matrix = confusion_matrix(labels, predictions, labels=range(5)) if len(labels) else np.zeros((5, 5))
    parts = sorted(forgotten), sorted(set(range(5)) - forgotten)
    for actual, rows in zip(forget_retain_accuracy(predictions, labels, forgotten), parts, strict=True):
        total = matrix[rows].sum()
        expected = sum(matrix[c, c] for c in rows) / total if total else np.nan
        assert actual == pytest.approx(expected, nan_ok=True)


def test_lists_and_one_class():
    assert per_class_accuracy([0, 1, 1, 2], [0, 1, 2, 2], 4).tolist()[:3] == [1.0, 1.0, 0.5]
    assert forget_retain_accuracy([0, 1, 1, 2], [0, 1, 2, 2], [2]) == (0.5, 1.0)
    assert all(np.isnan(value) for value in forget_retain_accuracy([], [], [2]))
    forget, retain = forget_retain_accuracy([3, 0], [3, 3], {3})
    assert forget == 0.5
    assert np.isnan(retain)
