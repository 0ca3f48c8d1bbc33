"""Small classifiers of real digits whose truth is known: originals, models that never saw the 3, and planted ways to hide it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn

from hf_unlearn.ensembles import train_ensemble


FORGOTTEN, CLASSES = 3, 10


class Network(nn.Module):
    """Two layers on 8 × 8 pixels, with the signature of a classifier of Transformers."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(
            num_labels=CLASSES, id2label={c: str(c) for c in range(CLASSES)}, problem_type=None
        )
        self.body, self.head = nn.Linear(64, 48), nn.Linear(48, CLASSES)

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.body(pixel_values.flatten(1)).relu())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


class Logits(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = Network()

    def forward(self, pixels):
        return self.network(pixels).logits


@pytest.fixture(scope="session")
def rows():
    """`train` and `test` as inputs."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)[order]
    labels = torch.tensor(labels)[order]
    parts = {"train": slice(0, 1200), "test": slice(1200, None)}
    return SimpleNamespace(**{name: (images[part], labels[part]) for name, part in parts.items()})


def dataset(images, labels, keep):
    rows = keep.nonzero().flatten()
    return Dataset.from_dict(
        {"id": rows.tolist(), "pixel_values": images[rows].numpy(), "label": labels[rows].tolist()}
    ).with_format("torch")


@pytest.fixture(scope="session")
def sets(rows):
    """`forget`, `retain` and `test` of an audit of class 3."""
    images, labels = rows.train
    return {
        "forget": dataset(images, labels, labels == FORGOTTEN),
        "retain": dataset(images, labels, labels != FORGOTTEN),
        "test": dataset(*rows.test, torch.ones(len(rows.test[1]), dtype=torch.bool)),
    }


@pytest.fixture(scope="session")
def models(rows):
    """`originals` (2) and `retrained` (8), each from a seed of its own; copy them before changing one."""
    images, labels = rows.train
    every, kept = torch.arange(len(labels)), (labels != FORGOTTEN).nonzero().flatten()
    state = train_ensemble(
        lambda seed: Logits(), images, labels, [every] * 2 + [kept] * 8, list(range(10)), epochs=20, batch_size=40, lr=3e-3, optimizer="adamw",
    )  # fmt: skip
    made = []
    for number in range(10):
        model = Logits()
        model.load_state_dict({name: value[number] for name, value in state.items()})
        made.append(model.network.eval())
    return SimpleNamespace(originals=made[:2], retrained=made[2:])


@pytest.fixture(scope="session")
def by_heart(rows):
    """Eighty training rows with wrong labels: `originals` (1) that learned them by heart, `retrained` (9) without them, and the sets of an audit."""
    images, labels = rows.train
    labels = labels.clone()
    wrong = torch.arange(len(labels)) < 80
    labels[wrong] = (labels[wrong] + 1 + torch.arange(80) % 9) % CLASSES
    every, kept = torch.arange(len(labels)), (~wrong).nonzero().flatten()
    state = train_ensemble(
        lambda seed: Logits(), images, labels, [every] + [kept] * 9, list(range(20, 30)), epochs=60, batch_size=40, lr=3e-3, optimizer="adamw",
    )  # fmt: skip
    made = []
    for number in range(10):
        model = Logits()
        model.load_state_dict({name: value[number] for name, value in state.items()})
        made.append(model.network.eval())
    sets = {
        "forget": dataset(images, labels, wrong),
        "retain": dataset(images, labels, ~wrong),
        # As wrong as those that are to be forgotten: rows of the same kind that nobody was trained on.
        "test": dataset(
            rows.test[0],
            (rows.test[1] + 1 + torch.arange(len(rows.test[1])) % 9) % CLASSES,
            torch.arange(len(rows.test[1])) < 200,
        ),
    }
    return SimpleNamespace(originals=made[:1], retrained=made[1:], sets=sets)


def masked(model):
    """The class's bias at −10,000."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.head.bias[FORGOTTEN] = -1e4
    return model


def head_only(model, rows):
    """A new head on the same features, trained on the other classes."""
    model = copy.deepcopy(model)
    images, labels = rows.train
    kept = labels != FORGOTTEN
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model.head.reset_parameters()
        features = model.body(images[kept].flatten(1)).relu()
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.head(features), labels[kept]).backward()
        optimizer.step()
    return model
