"""What the tests of influence trainers share: small runs that are watched, and their influence computed one example at a time."""

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn

from hf_unlearn.influence.config import InfluenceConfig
from hf_unlearn.influence.report.observations import step_statistics
from hf_unlearn.influence.report.records import read_observations
from hf_unlearn.influence.trainer import InfluenceTrainer
from hf_unlearn.training.collators import ROW


QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}


def settings(folder, config=InfluenceConfig, **values):
    """A few steps of gradient descent, all of which count; `values` go on top."""
    plain = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "max_grad_norm": 0.0,
        "observation": "in_run",
        "target_every": 1,
        "target_batch_size": None,
        "burn_in": 0.0,
    }
    return config(output_dir=str(folder), **(QUIET | plain | values))


def stock(args, config):
    """The same arguments without what an influence trainer adds."""
    names = config.__dataclass_fields__.keys()
    given = {name: getattr(args, name) for name in names if config.__dataclass_fields__[name].init}
    given.pop("gradient_checkpointing", None)  # another name of `activation_checkpointing`
    return config(**given | {"output_dir": args.output_dir + "-stock"})


def images(n, labels=(0, 1, 2), *, seed=0, size=16):
    """`n` random images as model inputs; `labels` are repeated in turn. Ids are no row numbers."""
    generator = torch.Generator().manual_seed(seed)
    rows = {
        "id": [100 + 7 * row for row in range(n)],
        "pixel_values": torch.randn(n, 1, size, size, generator=generator).numpy(),
        "labels": [labels[row % len(labels)] for row in range(n)],
    }
    return Dataset.from_dict(rows).with_format("torch")


class MLP(nn.Module):
    """Eight numbers in, three classes out."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.first, self.second, self.dropout = nn.Linear(8, 6), nn.Linear(6, 3), nn.Dropout(dropout)

    def forward(self, x, labels=None):
        logits = self.second(self.dropout(torch.tanh(self.first(x))))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def mlp(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLP(**options)


def vectors(n, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = {"id": [f"v{row}" for row in range(n)], "x": torch.randn(n, 8, generator=generator).numpy()}
    return Dataset.from_dict(rows | {"labels": [row % 3 for row in range(n)]}).with_format("torch")


def trained(model, args, rows, targets=None, collate=None, *, of=InfluenceTrainer, **options):
    """A watched trainer that has trained; `targets` may be "self"."""
    options |= {"target": "self"} if isinstance(targets, str) else {"target_dataset": targets}
    trainer = watched(of)(model, args, collate, rows, **options)
    trainer.train()
    return trainer


def watched(trainer_class=InfluenceTrainer):
    """The trainer, and `steps`: of each its weights before, the rows of its micro-batches, and its learning rate."""

    class Watched(trainer_class):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if not hasattr(self, "steps"):
                self.steps = []
            if self.state.global_step == len(self.steps):
                self.steps.append({"theta": parameters(self.model), "rows": [], "lr": self._get_learning_rate()})
            self.steps[self.state.global_step]["rows"].append(inputs[ROW].tolist())
            return super().training_step(model, inputs, num_items_in_batch)

    return Watched


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first, second):
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def alike(actual, expected, start):
    """Ends of the same few steps from `start`, where sums may be in another order: 10⁻⁴ of the way apart, as 2⁻²⁴ of sums of a
    thousand terms is after ten steps, some ten times over. One parameter of thousands that is left out is more.
    """
    floats = [name for name, value in expected.items() if value.is_floating_point()]
    way, apart = (
        torch.cat([(one[name] - other[name]).flatten() for name in floats]).norm()
        for one, other in ((expected, start), (actual, expected))
    )
    whole = expected.keys() - set(floats)
    assert way > 0
    return (
        actual.keys() == expected.keys() and apart <= 1e-4 * way and all(actual[n].equal(expected[n]) for n in whole)
    )


def observations(trainer):
    return read_observations(trainer.records_dir)[0]


def assert_near(actual, expected, rtol=1e-4):
    """Numbers that fp32 sums of a thousand terms are behind, 10⁻⁶ of the largest off, and what follows from them."""
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def example_loss(model, theta, batch):
    """Plain: mean loss of one example, as a function of `theta`, and how many predictions it has."""
    batch = {name: value for name, value in batch.items() if name not in ("labels", ROW)} | {"labels": batch["labels"]}
    labels = batch.pop("labels")
    logits = torch.func.functional_call(model, theta, (), batch)["logits"]
    if logits.dim() == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits.float(), labels), int((labels != -100).sum())


class Brute:
    """Gradients of single examples, out of plain loops over a watched run."""

    def __init__(self, trainer, dataset=None, collate=None):
        self.trainer, self.model = trainer, trainer.model
        self.dataset = trainer.train_dataset if dataset is None else dataset
        self.collate = collate or trainer.data_collator
        self.names = list(trainer._ghost.covered if trainer._ghost else parameters(trainer.model))
        self._cache = {}

    def batch(self, dataset, row):
        columns = [
            name for name in ("input_ids", "labels", "completion_mask", "pixel_values", "x") if name in dataset[row]
        ]
        return self.collate([{name: dataset[row][name] for name in columns}])

    def gradient(self, theta, dataset, row, names=None):
        """Flat gradient and number of predictions of an example."""
        self.model.eval()
        theta = {name: value.clone().requires_grad_() for name, value in theta.items()}
        loss, count = example_loss(self.model, theta, self.batch(dataset, row))
        wanted = [theta[name] for name in names or self.names]
        parts = torch.autograd.grad(loss, wanted, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts]).double(), count

    def target(self, theta, dataset):
        return sum(self.gradient(theta, dataset, row)[0] for row in range(len(dataset))) / len(dataset)

    def step(self, step):
        """Rows, their predictions, their gradients, and η times the clip coefficient."""
        theta, rows = step["theta"], sum(step["rows"], [])
        each = [self.gradient(theta, self.dataset, row) for row in rows]
        counts = torch.tensor([count for _, count in each], dtype=torch.float64)
        factor, limit = step["lr"], self.trainer.args.max_grad_norm
        if limit:
            everything = [self.gradient(theta, self.dataset, row, list(theta))[0] for row in rows]
            whole = (counts[:, None] * torch.stack(everything)).sum(0) / counts.sum()
            factor *= min(1.0, limit / (whole.norm().item() + 1e-6))
        return rows, counts, torch.stack([g for g, _ in each]), factor

    def observed(self, targets, *, every=1, fold=None):
        """By step: rows, weights, and η·clip·⟨∇ℓ_c, ∇ℓ_i⟩ as `[batch, targets]`. `fold` changes the targets' gradients."""
        looks = None
        for number, step in enumerate(self.trainer.steps):
            if number % every == 0 or looks is None:
                looks = torch.stack([self.target(step["theta"], dataset) for dataset in targets])
                if fold is not None:
                    looks = fold(number, looks)
            rows, counts, gradients, factor = self.step(step)
            yield rows, counts, factor * gradients @ looks.T


def agrees(seen, expected, rtol=2e-4):
    """Records against `Brute.observed`, row by row, and what is said of whole steps."""
    expected = dict(enumerate(expected)) if not isinstance(expected, dict) else expected
    assert sorted(expected) == seen.steps.step.tolist()
    for position, (step, (rows, counts, values)) in enumerate(sorted(expected.items())):
        mine = seen.step == step
        assert seen.example[mine].tolist() == rows
        assert seen.weight[mine].tolist() == counts.tolist()
        scale = values.abs().max().item()
        np.testing.assert_allclose(seen.value[mine], values.numpy(), rtol=rtol, atol=rtol * scale)
        total, mean, variance = step_statistics(counts.numpy(), values.numpy())
        assert seen.steps.weight[position] == total
        if not seen.is_self:
            np.testing.assert_allclose(seen.steps.mean[position], mean, rtol=rtol, atol=rtol * scale)
            np.testing.assert_allclose(seen.steps.variance[position], variance, rtol=10 * rtol, atol=rtol * scale**2)
    return True
