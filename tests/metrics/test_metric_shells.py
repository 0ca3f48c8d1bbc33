"""The shells say what the functions say, in one go and batch by batch; nothing is downloaded."""

from dataclasses import asdict

import numpy as np
import pytest

from hf_unlearn.metrics import generation
from hf_unlearn.metrics.features import Features


shells = pytest.importorskip("hf_unlearn.metrics.shells")
RNG = np.random.default_rng(0)
REAL, FAKE = RNG.normal(size=(12, 3)), RNG.normal(size=(12, 3)) + 1
CASES = [
    (shells.FrechetDistance, generation.frechet_distance, {}),
    (shells.KernelDistance, generation.kernel_distance, {"subsets": 4, "subset_size": 6, "seed": 3}),
    (shells.DensityCoverage, generation.density_coverage, {"k": 2}),
]


@pytest.fixture(params=[True, False], ids=["memory", "file"])
def where(request, tmp_path):
    return {"keep_in_memory": request.param, "cache_dir": str(tmp_path)}


@pytest.mark.parametrize(("shell", "function", "settings"), CASES)
def test_features(shell, function, settings, where):
    expected = asdict(function(Features(REAL, "test"), Features(FAKE, "test"), **settings))
    metric = shell(**where)
    assert metric.compute(predictions=FAKE, references=REAL, extractor="test", **settings) == pytest.approx(expected)
    for rows in (slice(0, 5), slice(5, 12)):
        metric.add_batch(predictions=FAKE[rows], references=REAL[rows])
    assert metric.compute(extractor="test", **settings) == pytest.approx(expected)


def test_percentage_unlearned(where):
    before, after = [3, 3, 3, 3, 1], [3, 0, 1, 2, 3]
    metric = shells.PercentageUnlearned(**where)
    expected = asdict(generation.percentage_unlearned(before, after, 3))
    assert metric.compute(predictions=after, references=before, forgotten=3) == expected
    metric.add_batch(predictions=after[:2], references=before[:2])
    metric.add_batch(predictions=after[2:], references=before[2:])
    assert metric.compute(forgotten=[3], confidence=0.9)["pul"] == expected["pul"] == 50.0


def test_errors_are_the_functions(where):
    metric = shells.FrechetDistance(**where)
    with pytest.raises(ValueError, match="at least 2 images"):
        metric.compute(predictions=FAKE[:1], references=REAL[:1], extractor="test")


def test_only_the_shells_import_evaluate():
    import subprocess
    import sys

    code = "import sys, hf_unlearn.metrics.generation; print('evaluate' in sys.modules, 'torchmetrics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 2
