"""The shells say what the functions say, in one go and batch by batch; nothing is downloaded."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from fresh import run_python

from hf_unlearn.metrics import generation, language
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


LOGITS = torch.from_numpy(RNG.normal(size=(6, 7, 4)))
LABELS = torch.from_numpy(RNG.integers(4, size=(6, 7)))
LABELS[:, :2], LABELS[::2, 5:] = -100, -100
LABELS[1::2] = torch.where(LABELS[1::2] == -100, -100, LOGITS.argmax(-1).roll(1, 1)[1::2])  # known by heart
SCORES = language.answer_scores(LOGITS, LABELS)
CHOICES = LOGITS.argmax(-1).tolist()
# A row's own length, as rows of different batches have it.
RAGGED = [row[:6] if number % 2 == 0 else row for number, row in enumerate(LABELS.tolist())]
NEXT = LOGITS.log_softmax(-1)[:, :-1].gather(-1, LABELS[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
LOSSES, FALSE = RNG.random(6), RNG.random((6, 3))


@pytest.mark.parametrize(
    ("shell", "predictions", "references", "settings", "expected"),
    [
        (
            shells.AnswerProbability,
            [[*row, 0.0] for row in NEXT.tolist()],
            RAGGED,
            {},
            {"probability": SCORES.probability.mean(), "loss": SCORES.nll.mean()},
        ),
        (shells.ExactMemorization, CHOICES, RAGGED, {}, {"exact_memorization": SCORES.exact_memorization.mean()}),
        (shells.ExtractionStrength, CHOICES, RAGGED, {}, {"extraction_strength": SCORES.extraction_strength.mean()}),
        (shells.RougeL, ["a b", "c"], ["b", "c d"], {}, {"rouge_l_recall": 3 / 4, "rouge_l_f1": 2 / 3}),
        (
            shells.TruthRatio,
            FALSE,
            LOSSES,
            {},
            {"truth_ratio": language.mean_truth_ratio(language.truth_ratio(LOSSES, FALSE), forgotten=True)},
        ),
        (
            shells.TruthRatio,
            FALSE,
            LOSSES,
            {"forgotten": False},
            {"truth_ratio": language.mean_truth_ratio(language.truth_ratio(LOSSES, FALSE), forgotten=False)},
        ),
        (
            shells.ForgetQuality,
            LOSSES,
            FALSE[:, 0],
            {},
            {"forget_quality": language.forget_quality(LOSSES, FALSE[:, 0])},
        ),
        (
            shells.MembershipAUC,
            [0.1, 0.5, 0.3, 0.4],
            [1, 0, 0, 1],
            {"retrained_auc": 0.5},
            {"auc": 0.75, "privleak": -50.0},
        ),
        (shells.ChoiceAccuracy, [[-1.0, -2.0], [-2.0, -3.0]], [0, 1], {}, {"accuracy": 0.5}),
    ],
)
def test_language(shell, predictions, references, settings, expected, tmp_path):
    """Rows differ in length, and come in two batches."""
    expected = {name: pytest.approx(float(value), rel=1e-5) for name, value in expected.items()}
    metric = shell(keep_in_memory=False, cache_dir=str(tmp_path))
    assert metric.compute(predictions=predictions, references=references, **settings) == expected
    for rows in (slice(0, 1), slice(1, None)):
        metric.add_batch(predictions=predictions[rows], references=references[rows])
    assert metric.compute(**settings) == expected


def test_only_the_shells_import_evaluate():
    """It takes seconds, and torchmetrics too."""
    run_python(
        "import sys; sys.modules.update(evaluate=None, torchmetrics=None); import hf_unlearn.metrics.generation"
    )
