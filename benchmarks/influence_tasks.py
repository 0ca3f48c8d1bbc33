"""Tasks that no default of f-INE was chosen on: what its unit is judged by. Small sets with a share of the labels made wrong.

Used by influence_units.py and influence_labels.py. The texts are those of the Debian package `fortunes`.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from influence_judge import DATA, JUDGES, Judge, Settings, Source, _digits
from sklearn.datasets import load_breast_cancer, load_wine
from torch import Tensor, nn


FORTUNES = Path("/usr/share/games/fortunes")
CATEGORIES = ("computers", "definitions", "songs-poems", "startrek", "zippy")
WORDS = 300


class Perceptron(nn.Module):
    """One hidden layer."""

    def __init__(self, inputs: int, hidden: int, classes: int):
        super().__init__()
        self.hidden, self.out = nn.Linear(inputs, hidden), nn.Linear(hidden, classes)

    def forward(self, x):
        return self.out(F.relu(self.hidden(x)))


class DigitsCNN(nn.Module):
    """Two convolutions and a linear layer, 8 × 8 in, 1,898 parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3, stride=2)
        self.out = nn.Linear(64, 10)

    def forward(self, x):
        return self.out(F.relu(self.second(F.relu(self.first(x.view(-1, 1, 8, 8))))).flatten(1))


class Words(nn.Module):
    """A bag of word vectors and one hidden layer."""

    def __init__(self, classes: int):
        super().__init__()
        self.vectors, self.hidden, self.out = nn.Linear(WORDS, 24), nn.Linear(24, 24), nn.Linear(24, classes)

    def forward(self, x):
        return self.out(F.relu(self.hidden(self.vectors(x))))


def _table(load, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, labels = load(return_X_y=True)
    x = torch.tensor((values - values.mean(0)) / values.std(0), dtype=torch.float32)
    return _split(x, torch.tensor(labels), rows)


def _split(x: Tensor, y: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:rows], order[rows:]
    return x[train], y[train], x[test], y[test]


def _fortunes(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which words of the commonest 300 are in a text; its category."""
    if not FORTUNES.is_dir():
        raise SystemExit(f"{FORTUNES} is not there; install it with: apt-get install fortunes")
    texts, labels = [], []
    for label, name in enumerate(CATEGORIES):
        entries = (FORTUNES / f"{name}.u8").read_text(encoding="utf-8").split("\n%\n")
        entries = list(dict.fromkeys(entry.strip().lower() for entry in entries if 20 <= len(entry) <= 400))[:360]
        texts += [set("".join(c if c.isalpha() or c == "'" else " " for c in entry).split()) for entry in entries]
        labels += [label] * len(entries)
    counts = Counter(word for words in texts for word in words)
    place = {
        word: i for i, (word, _) in enumerate(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:WORDS])
    }
    x = torch.zeros(len(texts), WORDS)
    for row, words in enumerate(texts):
        x[row, [place[word] for word in words if word in place]] = 1
    return _split(x / x.sum(1, keepdim=True).clamp(min=1).sqrt(), torch.tensor(labels), rows)


DATA |= {
    "digits, CNN": Source(1000, DigitsCNN, (40, 30), _digits),
    "wine": Source(120, partial(Perceptron, 13, 32, 3), (12, 12), partial(_table, load_wine)),
    "breast cancer": Source(380, partial(Perceptron, 30, 32, 2), (30, 30), partial(_table, load_breast_cancer)),
    "fortunes": Source(900, partial(Words, len(CATEGORIES)), (40, 40), _fortunes),
}


WRONG = 0.15  # share of labels, but for the digits of influence_fidelity.py
TASKS = {
    "digits MLP, SGD": JUDGES["digits, SGD"],
    "digits MLP, AdamW": JUDGES["digits, AdamW"],
    "digits CNN, SGD": Settings("digits, CNN", "sgd", 0.1, 0.0, 10, 50, 60),
    "digits CNN, AdamW": Settings("digits, CNN", "adamw", 3e-3, 0.01, 10, 50, 60),
    "wine, SGD": Settings("wine", "sgd", 0.1, 0.0, 20, 10, 150),
    "wine, AdamW": Settings("wine", "adamw", 5e-3, 0.01, 20, 10, 150),
    "breast cancer, SGD": Settings("breast cancer", "sgd", 0.1, 0.0, 12, 20, 150),
    "breast cancer, AdamW": Settings("breast cancer", "adamw", 5e-3, 0.01, 12, 20, 150),
    "fortunes, SGD": Settings("fortunes", "sgd", 0.2, 0.0, 12, 30, 60),
    "fortunes, AdamW": Settings("fortunes", "adamw", 3e-3, 0.01, 6, 30, 60),
    "digits, one epoch": Settings("digits", "sgd", 0.2, 0.0, 1, 10, 100),
    "breast cancer, batches of 4": Settings("breast cancer", "sgd", 0.05, 0.0, 6, 4, 150),
}
MOST_GROUPS = 9


def load(name: str) -> tuple[Judge, list[np.ndarray]]:
    """The judge of a task, and groups of its rows: wrong labels of each class, right ones, and rows at random."""
    if TASKS[name] in JUDGES.values():
        judge = Judge.load(TASKS[name])
        return judge, judge.groups()
    judge = Judge.load(TASKS[name], WRONG)
    groups = judge.groups()
    return judge, groups[:: -(-len(groups) // MOST_GROUPS)]
