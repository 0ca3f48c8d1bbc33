"""Membership: whether the forget rows still look like rows that the model was trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..check import Reading, Role
from ..membership import membership_by_entropy
from .answers import OnRows
from .data import ClassifierData, Part
from .subject import ClassifierSubject


LOW = (0.01, 0.05)  # false positive rates at which the share that is found is told beside


class MembershipByLoss(OnRows):
    name, title, unit, margin, layer = "membership_loss", "Membership by loss", "AUC", 0.1, "below"
    what = "Whether forget rows have a lower loss than unseen rows of their classes. Blind where the model generalises: then the original passes too."

    def missing(self, data: ClassifierData, roles: Sequence[Role]) -> str | None:
        few = len(unseen(data)) < 2
        return "there are no unseen rows to compare with" if few else super().missing(data, roles)

    def read(self, subject: ClassifierSubject, data: ClassifierData, seed: int) -> Reading:
        members = -subject.look(data.forget).losses.numpy()
        others = -subject.look(unseen(data)).losses.numpy()
        return Reading.auc_of(members, others, **found_at_few_alarms(members, others))


class MembershipByEntropy(OnRows):
    name, title, margin, layer, paper = "membership_entropy", "Membership by entropy", 0.1, "below", "2403.16246"
    parts = ("forget", "retain", "test_retain")
    what = "The share of forget rows that an attacker takes for training rows who has learned from retained and unseen ones how sure the model is of each."

    def read(self, subject: ClassifierSubject, data: ClassifierData, seed: int) -> Reading:
        logits = [subject.look(part).logits.numpy() for part in (data.retain, data.test_retain, data.forget)]
        share, count = membership_by_entropy(*logits), len(data.forget)
        return Reading(share, error=float(np.sqrt(share * (1 - share) / count)), n=count).checked()


def unseen(data: ClassifierData) -> Part:
    """Rows that nobody trained on, of the classes of the forget rows."""
    return data.test_forget if data.classes else data.test_retain


def found_at_few_alarms(members: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """The share of members above nearly all others, of which there must be enough for so low a rate: with n of them none below 1/n is told from 0."""
    return {
        f"found_at_{rate:.0%}_false_alarms": float((members > np.quantile(others, 1 - rate, method="higher")).mean())
        for rate in LOW
    }
