"""Losses and gradients that cannot be told apart by example, or are not finite: said before anything is updated with them."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from brute_force import mlp, observations, same, settings, state, vectors
from transformers import TrainerCallback

from hf_unlearn.influence.trainer import InfluenceTrainer


class Both(torch.nn.Module):
    """A loss with a penalty that belongs to no example."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 3)

    def forward(self, x, labels=None):
        logits = self.layer(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels) + self.layer.weight.square().sum(), "logits": logits}


DATA = {"train_dataset": vectors(8), "target_dataset": vectors(3, seed=1)}


def test_a_loss_that_is_no_mean_over_examples(tmp_path):
    model = Both()
    before = state(model)
    trainer = InfluenceTrainer(model, settings(tmp_path), **DATA)
    with pytest.raises(ValueError, match=r"^compute_loss: .* is not the mean of the examples' own losses[^\n]*$"):
        trainer.train()
    assert same(state(model), before)
    assert not trainer._ghost._handles


def test_such_a_loss_with_its_own_per_example_loss(tmp_path):
    class Own(InfluenceTrainer):
        def per_example_loss(self, model, inputs):
            losses, weights = super().per_example_loss(model, inputs)
            return losses + model.layer.weight.square().sum(), weights

    trainer = Own(Both(), settings(tmp_path), **DATA)
    trainer.train()
    assert len(observations(trainer).steps.step) == 3


@pytest.mark.parametrize("observation", ["in_run", "propagated"])
def test_gradients_that_are_not_finite(observation, tmp_path):
    """At the third step: nothing is updated with them, and what was recorded before is kept."""

    class Explodes(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                weights.append(copy.deepcopy(model.state_dict()))
                model.second.bias.register_hook(lambda gradient: gradient * math.nan)

    weights = []
    args = settings(tmp_path, max_steps=5, max_grad_norm=1.0, observation=observation)
    trainer = InfluenceTrainer(mlp(), args, callbacks=[Explodes()], **DATA)
    with pytest.raises(FloatingPointError, match=r"^gradient is not finite at step 3: nothing was updated[^\n]*$"):
        trainer.train()
    assert same(trainer.model.state_dict(), weights[0])
    if observation == "in_run":
        assert observations(trainer).steps.step.tolist() == [0, 1]
        assert np.isfinite(observations(trainer).value).all()
        assert len(trainer.influence.top(2)) == 2
