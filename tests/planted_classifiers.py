"""Small classifiers of digits, and planted ways to hide the 3: what tests of the audit share."""

import copy
from types import SimpleNamespace

import torch
from datasets import Dataset
from torch import nn


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


def dataset(images, labels, keep):
    rows = keep.nonzero().flatten()
    return Dataset.from_dict(
        {"id": rows.tolist(), "pixel_values": images[rows].numpy(), "label": labels[rows].tolist()}
    ).with_format("torch")


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
