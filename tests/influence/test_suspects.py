"""Margins that a run sees, and the wrong labels that they tell."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from brute_force import mlp, observations, settings, trained, vectors
from datasets import Dataset

from hf_unlearn.influence.report.report import InfluenceReport
from hf_unlearn.influence.step import margins


def test_margins_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.4, 0.4, 0.2]]))
    inputs = {"labels": torch.tensor([0, 1, -100])}
    found = margins([logits], inputs, "labels", torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([0.2, -0.5, torch.nan]), equal_nan=True)
    for other in ([], [logits[None]], [logits[:2]]):
        assert margins(other, inputs, "labels", torch.ones(3)).isnan().all()
    assert margins([logits], {"labels": torch.rand(3)}, "labels", torch.ones(3)).isnan().all()


@pytest.mark.parametrize("observation", ["in_run", "propagated"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_margins_are_those_before_each_step(observation, accumulated, tmp_path):
    args = settings(tmp_path, observation=observation, max_steps=4, gradient_accumulation_steps=accumulated)
    trainer = trained(mlp(), args, vectors(12), vectors(3, seed=1))
    seen, rows = observations(trainer), vectors(12)[:]
    assert len(seen.margin) == len(seen.step) > 0
    for row in range(len(seen.step)):
        example, theta = seen.example[row], trainer.steps[seen.step[row]]["theta"]
        logits = torch.func.functional_call(trainer.model, theta, (rows["x"][example][None],))["logits"][0]
        p, label = logits.softmax(-1), rows["labels"][example]
        other = max(p[c].item() for c in range(3) if c != label)
        assert seen.margin[row] == pytest.approx(p[label].item() - other, abs=1e-5)
    mean = [seen.margin[seen.example == example].mean() for example in range(12) if example in seen.example]
    np.testing.assert_allclose(np.sort(seen.mean_margin()[np.isfinite(seen.mean_margin())]), np.sort(mean), rtol=1e-5)


def classes(n=60, wrong=6):
    """Three classes far apart; the first rows have the label of the next class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    x = 0.3 * torch.randn(n, 8, generator=generator)
    x[torch.arange(n), labels] += 2
    labels[:wrong] = (labels[:wrong] + 1) % 3
    ids = [f"v{row}" for row in range(n)]
    return Dataset.from_dict({"id": ids, "x": x.numpy(), "labels": labels.tolist()}).with_format("torch")


def test_wrong_labels_are_found_and_survive_the_disk(tmp_path):
    args = settings(
        tmp_path / "run", max_steps=-1, num_train_epochs=12, per_device_train_batch_size=6, learning_rate=0.5
    )
    report = trained(mlp(), args, classes(), "self").influence.join(
        Dataset.from_dict({"id": [f"v{row}" for row in range(60)], "wrong": [row < 6 for row in range(60)]}), "id", "wrong"
    )  # fmt: skip
    found = report.suspects()
    assert found.column_names == ["sample_id", "n_observations", "wrong", "margin"]
    assert sorted(found["sample_id"][:]) == [f"v{row}" for row in range(6)]
    assert (np.diff(found["margin"][:]) >= 0).all()
    assert (np.array(found["margin"][:]) < 0).all()
    assert report.suspects(2)["sample_id"][:] == found["sample_id"][:2]
    assert len(report.suspects(1000)) == 60
    report.save_to_disk(tmp_path / "report")
    assert InfluenceReport.load_from_disk(tmp_path / "report").suspects()[:] == found[:]
    with pytest.raises(ValueError, match="^k=0: must be at least 1"):
        report.suspects(0)


def test_a_run_without_margins_says_so(tmp_path):
    args = settings(tmp_path, observation="in_run", max_steps=2)
    report = trained(mlp(), args, vectors(6), vectors(3, seed=1)).influence
    report = replace(report, observations=replace(report.observations, margin=None))
    with pytest.raises(ValueError, match="^suspects: the run saw no margins"):
        report.suspects()
