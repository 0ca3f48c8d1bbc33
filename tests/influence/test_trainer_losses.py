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


def penalty(self, model, inputs, **kwargs):
    return self.stock(model, inputs, **kwargs) + model.second.weight.square().sum()


def from_the_start(self, model, inputs, **kwargs):
    """Nothing at first, and its gradient too."""
    if not hasattr(self, "start"):
        self.start = state(model)
    return self.stock(model, inputs, **kwargs) + sum(
        (p - self.start[n]).square().sum() for n, p in model.named_parameters()
    )


def late(self, model, inputs, **kwargs):
    return self.stock(model, inputs, **kwargs) * (2.0 if self.state.global_step >= 3 else 1.0)


def in_the_last_step(self, model, inputs, **kwargs):
    return self.stock(model, inputs, **kwargs) * (2.0 if self.state.global_step == 5 else 1.0)


CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 5.0])


def class_weights(self, model, inputs, **kwargs):
    """Without calling the trainer's own; a fresh head has the same loss in all classes."""
    return F.cross_entropy(model(inputs["x"])["logits"], inputs["labels"], weight=CLASS_WEIGHTS)


def weighed_and_penalised(self, model, inputs, **kwargs):
    return class_weights(self, model, inputs) + (model.first.weight - 1).square().sum()


def focal(self, model, inputs, **kwargs):
    """Its gradient at the logits is that of the cross-entropy with weights, which depend on the model."""
    nll = F.cross_entropy(model(inputs["x"])["logits"], inputs["labels"], reduction="none")
    return ((1 - (-nll).exp()).square() * nll).mean()


def smoothed(self, model, inputs, **kwargs):
    return F.cross_entropy(model(inputs["x"])["logits"], inputs["labels"], label_smoothing=0.2)


def plain(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    return F.cross_entropy(model(inputs["x"])["logits"], inputs["labels"])


@pytest.mark.parametrize(
    ("loss", "step", "observation"),
    [
        (penalty, 2, "propagated"), (from_the_start, 2, "in_run"), (late, 5, "in_run"), (in_the_last_step, 6, "in_run"),
        (focal, 1, "in_run"), (weighed_and_penalised, 1, "propagated"), (smoothed, 1, "in_run"),
    ],
)  # fmt: skip
def test_a_loss_that_is_no_mean_over_examples(loss, step, observation, tmp_path):
    class Other(InfluenceTrainer):
        compute_loss, stock = loss, InfluenceTrainer.compute_loss

    model = mlp()
    torch.nn.init.zeros_(model.second.weight), torch.nn.init.zeros_(model.second.bias)
    before = state(model)
    trainer = Other(model, settings(tmp_path, max_steps=6, observation=observation), **DATA)
    message = rf"^compute_loss: at step {step} it is not the mean of the examples' own losses[^\n]*override per_example_loss$"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert same(state(model), before) == (step == 1)
    assert "compute_loss" not in vars(trainer)
    assert observation == "propagated" or not trainer._ghost._handles


@pytest.mark.parametrize("how", ["a subclass", "an attribute"])
def test_a_mean_that_does_not_call_the_trainers_own_loss(how, tmp_path):
    class Own(InfluenceTrainer):
        compute_loss = plain

    args = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    seen = []
    for number, trainer_class in enumerate((InfluenceTrainer, Own if how == "a subclass" else InfluenceTrainer)):
        trainer = trainer_class(mlp(), settings(tmp_path / str(number), **args), **DATA)
        if number and how == "an attribute":
            trainer.compute_loss = own = lambda *args, **kwargs: plain(None, *args, **kwargs)
        trainer.train()
        seen.append(observations(trainer).value)
    assert how == "a subclass" or trainer.compute_loss is own
    np.testing.assert_allclose(seen[1], seen[0], rtol=1e-4, atol=1e-6)


class Weighs(InfluenceTrainer):
    compute_loss = class_weights


class Told(Weighs):
    def _weights_of(self, labels):
        return CLASS_WEIGHTS[labels]


class WeighsInMean(InfluenceTrainer):
    """A mean over examples, of which classes weigh."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        nll = F.cross_entropy(model(inputs["x"])["logits"], inputs["labels"], reduction="none")
        return (CLASS_WEIGHTS[inputs["labels"]] * nll).mean()


class Folds(WeighsInMean):
    """The same, told as losses that are larger."""

    def per_example_loss(self, model, inputs):
        nll, weights = super().per_example_loss(model, inputs)
        return CLASS_WEIGHTS[inputs["labels"]] * nll, weights


@pytest.mark.parametrize("observation", ["in_run", "propagated"])
@pytest.mark.parametrize(("finds", "knows", "accumulated"), [(Weighs, Told, 1), (WeighsInMean, Folds, 2)])
def test_weights_of_classes_are_read_off_the_gradient(observation, finds, knows, accumulated, tmp_path):
    """As where they are told. The targets are of a class that weighs 1, so that their loss is the same."""
    targets = vectors(9, seed=1).filter(lambda row: row["labels"] == 0)
    args = {"observation": observation, "gradient_accumulation_steps": accumulated, "max_steps": 4}
    shares, after = [], []
    for number, trainer_class in enumerate((finds, knows)):
        trainer = trainer_class(
            mlp(), settings(tmp_path / str(number), **args), train_dataset=vectors(16), target_dataset=targets
        )
        trainer.train()
        assert trainer._weighs is (trainer_class is finds)
        seen = observations(trainer)
        order = np.lexsort((seen.example, seen.position))
        shares.append((seen.weight[:, None] / seen.steps.weight[seen.position, None] * seen.value)[order])
        after.append(state(trainer.model))
    assert same(*after)
    assert np.abs(shares[1]).max() > 0.01
    np.testing.assert_allclose(shares[0], shares[1], rtol=2e-3, atol=1e-6)


def test_a_loss_that_is_given_as_a_function(tmp_path):
    seen = []
    for number, (trainer_class, given) in enumerate(
        [(Weighs, {}), (InfluenceTrainer, {"compute_loss_func": lambda outputs, labels, **_: F.cross_entropy(outputs["logits"], labels, weight=CLASS_WEIGHTS)})]
    ):  # fmt: skip
        trainer = trainer_class(mlp(), settings(tmp_path / str(number)), **DATA, **given)
        trainer.train()
        seen.append(observations(trainer))
    np.testing.assert_allclose(seen[1].value, seen[0].value, rtol=1e-5)
    np.testing.assert_allclose(seen[1].weight, seen[0].weight, rtol=1e-5)


def test_a_step_that_nobody_saw(tmp_path):
    class Blind(InfluenceTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(inputs["x"], inputs["labels"])["loss"]
            loss.backward()
            return loss.detach()

    with pytest.raises(ValueError, match=r"^training_step: [^\n]*call super\(\).training_step in yours$"):
        Blind(mlp(), settings(tmp_path), **DATA).train()


class Tuples(torch.nn.Module):
    """As `return_dict=False`."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x, labels=None):
        return tuple(self.inner(x, labels).values())


@pytest.mark.parametrize("observation", ["in_run", "propagated"])
def test_models_that_return_tuples(observation, tmp_path):
    seen = []
    for number, model in enumerate((mlp(), Tuples())):
        trainer = InfluenceTrainer(model, settings(tmp_path / str(number), observation=observation), **DATA)
        trainer.train()
        seen.append(observations(trainer).value)
    np.testing.assert_allclose(seen[1], seen[0], rtol=1e-4, atol=1e-6)


def test_models_whose_losses_by_example_are_not_known(tmp_path):
    class Map(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 12)

        def forward(self, x, labels=None):
            logits = self.layer(x).view(-1, 3, 2, 2)
            return {"loss": logits.sum(), "logits": logits}

    with pytest.raises(ValueError, match=r"^model: its logits \(\[\d, 3, 2, 2\]\) do not fit labels \[\d\]: [^\n]*$"):
        InfluenceTrainer(Map(), settings(tmp_path), **DATA).train()


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
