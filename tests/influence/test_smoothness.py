"""`smoothness`: three trainings by hand, and a trainer that is none the wiser."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from brute_force import mlp, settings, vectors
from datasets import Dataset

from hf_unlearn import FINEConfig, FINETrainer, InfluenceTrainer, smoothness
from hf_unlearn.influence.smoothness import ENOUGH, agreement, trained_along


ROWS = 12


def trainer_of(folder, model=None, *, rows=ROWS, **values):
    args = settings(folder, **({"per_device_train_batch_size": ROWS, "max_steps": 6} | values))
    targets = {"a": vectors(5, seed=1), "b": vectors(4, seed=2)}
    return InfluenceTrainer(model or mlp(), args, train_dataset=vectors(rows), target_dataset=targets)


def flat(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def adamw(model):
    """Biases do not decay, as in Trainer."""
    groups = [{"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0} for p in model.parameters()]
    return torch.optim.AdamW(groups, lr=0.03)


def by_hand(weights, steps, *, optim, clip=0.0, decay=None):
    """Full batches, in one order or another; the loss is divided by the number of rows, not by their weights."""
    model, rows = mlp(), vectors(ROWS)
    optimizer = optim(model)
    for step in range(steps):
        if decay is not None:
            for group in optimizer.param_groups:
                group["lr"] = decay * (1 - step / 6)
        each = F.cross_entropy(model(rows["x"][:])["logits"], rows["labels"][:], reduction="none")
        optimizer.zero_grad()
        ((weights * each).sum() / ROWS).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    losses = []
    for seed, count in ((1, 5), (2, 4)):
        targets = vectors(count, seed=seed)
        losses.append(F.cross_entropy(model(targets["x"][:])["logits"], targets["labels"][:], reduction="none"))
    return torch.cat(losses).detach().double(), flat(model)


def moved_rows(**given):
    count = max(1, round(given["share"] * ROWS))
    return np.random.default_rng([given["seed"], 5]).permutation(ROWS)[:count]


@pytest.mark.parametrize(
    ("values", "hand"),
    [
        ({}, {"optim": sgd}),
        (
            {"optim": "adamw_torch", "learning_rate": 0.03, "weight_decay": 0.1, "lr_scheduler_type": "linear", "max_grad_norm": 0.2},
            {"optim": adamw, "decay": 0.03, "clip": 0.2},
        ),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}, {"optim": sgd}),
    ],
    ids=["SGD", "AdamW, a schedule, clipping", "accumulated"],
)  # fmt: skip
@pytest.mark.parametrize(("steps", "h"), [(None, -0.5), (4, 0.3)])
def test_three_trainings_by_hand(values, hand, steps, h, tmp_path):
    given = {"share": 0.25, "seed": 3}
    trainer = trainer_of(tmp_path, **values)
    losses, parameters = trained_along(trainer, steps=steps, h=h, **given)
    moved = moved_rows(**given)
    assert len(moved) == 3
    for times in range(3):
        weights = torch.ones(ROWS)
        weights[moved] += times * h
        wanted = by_hand(weights, steps or 6, **hand)
        torch.testing.assert_close(losses[times], wanted[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(parameters[times], wanted[1], rtol=1e-3, atol=1e-5)
    first, second = losses.diff(dim=0)
    expected = sum(abs(a) * (1 if a * b > 0 else -1) for a, b in zip(first, second, strict=True)) / first.abs().sum()
    assert smoothness(trainer, steps=steps, h=h, **given) == pytest.approx(float(expected), abs=1e-6)


def test_agreement():
    first = torch.tensor([4.0, -3.0, 2.0, 1.0])
    assert agreement(first, 0.1 * first) == 1
    assert agreement(first, -first) == -1
    assert agreement(first, torch.tensor([1.0, 1.0, 0.0, 9.0])) == pytest.approx((4 - 3 + 0 + 1) / 10)
    assert agreement(0 * first, first) == 1


def test_the_page_has_the_bound_of_the_warning(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import smoothness_report

    assert smoothness_report.ENOUGH == ENOUGH


def test_it_leaves_the_trainer_as_it_was(tmp_path):
    """What it trains afterwards, mini-batches, dropout and all, is what it would have trained."""
    ends = []
    for looked in (False, True):
        trainer = trainer_of(tmp_path / str(looked), mlp(dropout=0.3), per_device_train_batch_size=5)
        torch.manual_seed(77)
        if looked:
            trainer.model.first.eval()
            before, state = flat(trainer.model), torch.get_rng_state()
            smoothness(trainer)
            assert torch.equal(flat(trainer.model), before)
            assert torch.equal(torch.get_rng_state(), state)
            assert trainer.optimizer is None
            assert all(p.grad is None for p in trainer.model.parameters())
            assert not trainer.model.first.training
            assert trainer.model.second.training
        trainer.train()
        ends.append(flat(trainer.model))
    assert torch.equal(*ends)


def test_the_three_have_one_order_and_one_noise(tmp_path):
    """So that what a change of the weights does goes to nothing with it."""
    trainer = trainer_of(tmp_path, mlp(dropout=0.5), rows=23, per_device_train_batch_size=5)
    _, parameters = trained_along(trainer, steps=None, share=0.2, h=1e-3, seed=0)
    moved = parameters.diff(dim=0).norm(dim=1)
    assert (moved < 1e-3).all()
    assert (moved > 1e-6).all()


@pytest.mark.parametrize("each", [6, 2])
def test_weights_of_one_are_a_run_of_a_language_model(each, tiny_llama, tokenizer, tmp_path):
    """Of answers of different lengths, each of whose tokens counts as much."""
    rows = {"prompt": ["Paris is"] * 6, "completion": [" the" * (1 + 3 * row) for row in range(6)]}
    args = settings(
        tmp_path, FINEConfig, per_device_train_batch_size=each, gradient_accumulation_steps=6 // each, max_steps=4, max_grad_norm=0.5
    )  # fmt: skip
    sets = {"train_dataset": Dataset.from_dict(rows), "target_dataset": Dataset.from_dict(rows)}
    trainer = FINETrainer(tiny_llama, args, processing_class=tokenizer, **sets)
    start = flat(trainer.model)
    _, parameters = trained_along(trainer, steps=None, share=0.5, h=-0.5, seed=0)
    trainer.train()  # all rows are in each step, so that their order is no matter
    apart, way = (parameters[0] - flat(trainer.model)).norm(), (flat(trainer.model) - start).norm()
    assert apart < 1e-3 * way
    assert (parameters[1] - parameters[0]).norm() > 0.02 * way


def test_short_ones_are_the_beginning_of_the_run(tmp_path):
    """Steps of a schedule that goes on after them, over epochs."""
    trainer = trainer_of(tmp_path, rows=11, per_device_train_batch_size=4, max_steps=-1, num_train_epochs=3)
    losses = {steps: trained_along(trainer, steps=steps, share=0.2, h=-0.5, seed=0)[0] for steps in (None, 9, 50, 7)}
    torch.testing.assert_close(losses[None], losses[9], rtol=0, atol=0)
    torch.testing.assert_close(losses[None], losses[50], rtol=0, atol=0)
    assert not torch.allclose(losses[None], losses[7])


@pytest.mark.parametrize(("rate", "warns"), [(0.02, False), (20.0, True)])
def test_a_learning_rate_that_is_far_too_large_is_said(rate, warns, tmp_path, caplog):
    """Of six models and shares of the rows: 0.98 to 1.00 of the small rate, −0.71 to −0.28 of the large one."""
    args = {"learning_rate": rate, "per_device_train_batch_size": 6, "max_steps": 60}
    with caplog.at_level("WARNING", "hf_unlearn"):
        value = smoothness(trainer_of(tmp_path, rows=24, **args))
    assert (value < 0.3) if warns else (value > 0.9)
    assert ("smaller learning_rate" in caplog.text) == warns


@pytest.mark.parametrize(
    ("given", "named"),
    [({"share": 0.0}, "share"), ({"share": 1.5}, "share"), ({"steps": 0}, "steps"), ({"h": 0.0}, "h"), ({"h": -0.6}, "h")],
)  # fmt: skip
def test_values_out_of_range(given, named, tmp_path):
    with pytest.raises(ValueError, match=f"^{named}"):
        smoothness(trainer_of(tmp_path), **given)


def test_what_it_cannot_look_at(tmp_path):
    args = settings(tmp_path / "self")
    own = InfluenceTrainer(mlp(), args, train_dataset=vectors(ROWS), target="self")
    with pytest.raises(ValueError, match="target='self'"):
        smoothness(own)
    trainer = trainer_of(tmp_path / "trained")
    trainer.train()
    with pytest.raises(ValueError, match="has trained"):
        smoothness(trainer)
    with pytest.raises(FloatingPointError, match="learning_rate"):
        smoothness(trainer_of(tmp_path / "diverges", learning_rate=3e38))
