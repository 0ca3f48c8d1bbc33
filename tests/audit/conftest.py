"""Small classifiers of real digits whose truth is known: originals, models that never saw the 3, and planted ways to hide it."""

from types import SimpleNamespace

import pytest
import torch
from planted_classifiers import CLASSES, FORGOTTEN, Logits, dataset

from hf_unlearn.ensembles import train_ensemble


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
