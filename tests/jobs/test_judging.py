"""Figures before and after, where they can be counted by hand."""

import pytest
import torch
from datasets import Dataset
from PIL import Image

from hf_unlearn.jobs import judging
from hf_unlearn.jobs.judging import Judge, Look, reference_of
from hf_unlearn.metrics.features import ClassifierFeatures, Features


def test_before_stands_before_after(tiny_resnet):
    """Samples that are the real images, and then only one of their two heaps, twice: half is covered."""
    heap = torch.eye(6, 8)
    real, half = torch.cat([heap, heap + 100]), torch.cat([heap, heap])
    classifier = ClassifierFeatures(tiny_resnet, name="judge")
    judge = Judge(classifier, 12, [3], Features(real, "judge"), "test", coverage=True)
    before = Look(torch.tensor([3] * 6 + [1] * 6), Features(real, "judge"))
    after = Look(torch.tensor([3] * 3 + [1] * 9), Features(half, "judge"))
    figures = {figure.metric: (figure.before, figure.after) for figure in judge.figures(before, after)[0]}
    # All eight coordinates of the mean move by 50, and each variance and covariance between heaps is gone: 50² of them all.
    assert figures.pop("fid") == pytest.approx((0.0, 8 * 50**2 + 8 * 50**2 * 12 / 11), rel=0.02, abs=1e-3)
    assert figures.pop("coverage") == (100.0, 50.0)
    assert figures == {"share": (50.0, 25.0), "pul": (0.0, 50.0), "total_variation": (0.0, 0.0)}


@pytest.mark.parametrize("each", [True, False])
def test_a_reference_is_read_in_parts(monkeypatch, tiny_resnet, each):
    rows = Dataset.from_dict({"image": [Image.new("L", (8, 8), 20 * shade) for shade in range(11)]})
    classifier = ClassifierFeatures(tiny_resnet, name="judge")
    whole = reference_of(rows, classifier, (1, 8, 8), resize=False)
    monkeypatch.setattr(judging, "PART", 4)
    parts = reference_of(rows, classifier, (1, 8, 8), resize=False, each=each)
    assert len(parts) == 11
    mean = parts.values.mean(0) if each else parts.mean
    torch.testing.assert_close(mean, whole.values.mean(0), rtol=1e-5, atol=1e-6)
    small = Dataset.from_dict({"image": [*rows["image"], Image.new("L", (4, 4))]})
    with pytest.raises(ValueError, match="an image is 4 × 4"):
        reference_of(small, classifier, (1, 8, 8), resize=False, each=each)
