"""Observations of runs that never were."""

import numpy as np

from hf_unlearn.influence.report.observations import Observations, Steps, step_statistics


def record(batches, *, examples=12, targets=("a", "b"), ids=None):
    """Observations of `batches`, a list of (step, examples, weight, value)."""
    numbers, members, weights, values = zip(*batches, strict=True)
    total, mean, variance = zip(*map(step_statistics, weights, values), strict=True)
    size = np.array([len(part) for part in members])
    steps = Steps(np.array(numbers), np.array(total), size, np.stack(mean), np.stack(variance))
    columns = [np.concatenate(part) for part in (members, weights, values)]
    ids = np.arange(examples) + 100 if ids is None else np.array(ids, dtype=object)
    return Observations(ids, targets, np.repeat(steps.step, size), *columns, steps)


def of_themselves():
    """Two steps of two examples that are their own targets; the μ of three, and σ, by hand."""
    value = np.array([[5.0, 1.0, 0.25], [2.0, 2.0, 1.0], [4.0, 1.0, 0.5], [9.0, 3.0, 0.75]])
    nothing, size = np.full((2, 1), np.nan), np.array([2, 2])
    steps = Steps(np.array([0, 1]), np.array([4.0, 2.0]), size, nothing, nothing)
    rows = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 2]), np.array([1.0, 3, 1, 1])
    sigma = np.sqrt((0.25 + 1 + 0.5 + 0.75) / 4 * 2)  # one for all: the mean over rows, at each of the two steps
    return Observations(np.arange(3), ("self",), *rows, value, steps), [(4 / 3 + 3) / sigma, 0, 6 / sigma]
