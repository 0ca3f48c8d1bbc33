"""What a classifier still knows below its answers: linear probes at every depth, and a head that is fitted anew."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ...modes import seeded_generator
from ..check import Reading
from .answers import OfClasses
from .data import ClassifierData
from .subject import ClassifierSubject


SHARE, LEAST, MOST = 0.02, 2, 20  # of the forget rows that a refitted head sees: a share, and no fewer and no more
DRAWS = 8
PROBED = 50  # rows of each class that a probe sees, at most


class OfFeatures(OfClasses):
    """A check of what features tell: fitted on half of the forget rows and on retained ones, asked about the other half and unseen rows."""

    layer = "below"
    of_stranger = None  # features of a class that was never seen tell it apart too

    def read(self, subject: ClassifierSubject, data: ClassifierData, seed: int) -> Reading:
        forget, retain, unseen = (subject.look(part) for part in (data.forget, data.retain, data.test_forget))
        order = torch.randperm(len(data.forget), generator=seeded_generator("cpu", seed, 21))
        known, asked = order.chunk(2) if len(order) > 1 else (order, order[:0])
        fitted_on = torch.cat([forget.labels[known], retain.labels])
        labels = torch.cat([forget.labels[asked], unseen.labels])
        depths = [
            (torch.cat([one[known], two]), torch.cat([one[asked], three] if len(unseen.labels) else [one[asked]]))
            for one, two, three in zip(
                forget.features, retain.features, unseen.features or forget.features, strict=True
            )
        ]
        return self.told(depths, fitted_on, labels, seed)

    def told(self, depths: list[tuple[Tensor, Tensor]], fitted_on: Tensor, labels: Tensor, seed: int) -> Reading:
        """Of features to fit on and to ask about, by depth."""
        raise NotImplementedError


class LinearProbe(OfFeatures):
    name, title, margin, paper = "linear_probe", "Linear probes at every depth", 0.05, "2604.08271"
    what = (
        "Whether the features still separate the forgotten classes where half of the forget rows are at hand. Those of any network do to "
        "some degree: only what is beyond retrained ones counts."
    )

    def told(self, depths: list[tuple[Tensor, Tensor]], fitted_on: Tensor, labels: Tensor, seed: int) -> Reading:
        rows = _of_each_class(fitted_on, PROBED, seed, 22)
        found = [_sure(known[rows], fitted_on[rows], asked, labels) for known, asked in depths]
        by_depth = {
            "by_depth": [float(sure.mean()) for sure, _ in found],
            "accuracy_by_depth": [float(right.mean()) for _, right in found],
        }
        return Reading.mean_of(np.mean([sure for sure, _ in found], axis=0), **by_depth)


class RefittedHead(OfFeatures):
    name, title, margin, paper = "refitted_head", "Head refitted with 2 % of the forget data", 0.1, "2405.17878"
    what = (
        "Whether a few forget rows, beside retained ones, bring the class back through the features that are there. What only changed the "
        "head fails."
    )

    def told(self, depths: list[tuple[Tensor, Tensor]], fitted_on: Tensor, labels: Tensor, seed: int) -> Reading:
        known, asked = depths[-1]
        forgotten = torch.isin(fitted_on, labels.unique())
        count = min(MOST, max(LEAST, round(SHARE * 2 * int(forgotten.sum()))))  # half of the rows are here
        sure, right = [], []
        for draw in range(DRAWS):
            few = _drawn(forgotten.nonzero().flatten(), count, seed, 23, draw)
            rows = torch.cat([few, _of_each_class(fitted_on, PROBED, seed, 24, draw, among=~forgotten)])
            one, two = _sure(known[rows], fitted_on[rows], asked, labels)
            sure.append(one)
            right.append(float(two.mean()))
        return Reading.mean_of(np.mean(sure, axis=0), rows=count, accuracy=float(np.mean(right)))


def _of_each_class(labels: Tensor, most: int, seed: int, *key: int, among: Tensor | None = None) -> Tensor:
    """Up to so many rows of each class, drawn."""
    among = torch.ones_like(labels, dtype=torch.bool) if among is None else among
    return torch.cat(
        [_drawn(((labels == c) & among).nonzero().flatten(), most, seed, *key, int(c)) for c in labels[among].unique()]
    )


def _drawn(rows: Tensor, most: int, seed: int, *key: int) -> Tensor:
    return rows[torch.randperm(len(rows), generator=seeded_generator("cpu", seed, *key))[:most]]


def _sure(known: Tensor, labels: Tensor, asked: Tensor, truth: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What a logistic regression on features gives to the right label of each row, and which it answers rightly, `[asked]` both."""
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=100))
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        regression.fit(known.double().numpy(), labels.numpy())
    given = regression.predict_proba(asked.double().numpy())
    places = np.searchsorted(regression.classes_, truth.numpy())
    return given[np.arange(len(given)), places], regression.classes_[given.argmax(1)] == truth.numpy()
