"""The shells say what the functions say, in one go and batch by batch; nothing is downloaded."""

from dataclasses import asdict

import numpy as np
import pytest
from fresh import run_python

from hf_unlearn.metrics import generation
from hf_unlearn.metrics.features import Features


shells = pytest.importorskip("hf_unlearn.metrics.shells")
RNG = np.random.default_rng(0)
REAL, FAKE = RNG.normal(size=(12, 3)), RNG.normal(size=(12, 3)) + 1


@pytest.mark.parametrize(
    ("shell", "function", "settings", "in_memory"),
    [
        (shells.FrechetDistance, generation.frechet_distance, {}, True),
        (shells.KernelDistance, generation.kernel_distance, {"subsets": 4, "subset_size": 6, "seed": 3}, False),
        (shells.DensityCoverage, generation.density_coverage, {"k": 2}, True),
    ],
)
def test_features(shell, function, settings, in_memory, tmp_path):
    expected = asdict(function(Features(REAL, "test"), Features(FAKE, "test"), **settings))
    metric = shell(keep_in_memory=in_memory, cache_dir=str(tmp_path))
    assert metric.compute(predictions=FAKE, references=REAL, extractor="test", **settings) == pytest.approx(expected)
    for rows in (slice(0, 5), slice(5, 12)):
        metric.add_batch(predictions=FAKE[rows], references=REAL[rows])
    assert metric.compute(extractor="test", **settings) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least"):  # of the function
        metric.compute(predictions=FAKE[:1], references=REAL[:1], extractor="test", **settings)


def test_percentage_unlearned(tmp_path):
    before, after = [3, 3, 3, 3, 1], [3, 0, 1, 2, 3]
    metric = shells.PercentageUnlearned(keep_in_memory=False, cache_dir=str(tmp_path))
    expected = asdict(generation.percentage_unlearned(before, after, 3))
    assert metric.compute(predictions=after, references=before, forgotten=3) == expected
    metric.add_batch(predictions=after[:2], references=before[:2])
    metric.add_batch(predictions=after[2:], references=before[2:])
    narrower = metric.compute(forgotten=[3], confidence=0.9)
    assert narrower["pul"] == expected["pul"] == 50.0
    assert narrower["low"] > expected["low"]


def test_only_the_shells_import_evaluate():
    """It takes seconds, and torchmetrics too."""
    run_python(
        "import sys; sys.modules.update(evaluate=None, torchmetrics=None); import hf_unlearn.metrics.generation"
    )
