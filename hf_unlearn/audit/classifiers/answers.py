"""What anyone sees who asks a classifier: how often it names what was to go, for rows it was trained on, unseen ones, and neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..check import Check, Reading, Role
from .data import ClassifierData
from .subject import ClassifierSubject


NEIGHBOURS = 0.1  # share of the kept rows that are nearest to the forgotten classes


class OnRows(Check):
    """A check of what a classifier answers on the rows of some parts."""

    parts: tuple[str, ...] = ("forget",)
    of_stranger: float | None = None  # value of a model that never saw a forgotten class

    def never_seen(self, data: ClassifierData) -> float | None:
        return self.of_stranger if data.classes else None

    def missing(self, data: ClassifierData, roles: Sequence[Role]) -> str | None:
        return next((f"there are no rows of {name}" for name in self.parts if not len(data.parts[name])), None)


class OfClasses(OnRows):
    """A check that has a meaning only where whole classes were to be forgotten; a model that never saw them says nothing of them."""

    of_stranger = 0.0

    def missing(self, data: ClassifierData, roles: Sequence[Role]) -> str | None:
        return super().missing(data, roles) if data.classes else "single examples were to be forgotten, not classes"


def confusion(answers: torch.Tensor, num_labels: int) -> list[float]:
    """Share of the answers that name each class."""
    return (torch.bincount(answers, minlength=num_labels) / max(1, len(answers))).tolist()


class ForgetAccuracy(OnRows):
    name, title, margin, layer = "forget_accuracy", "Accuracy on the forget data", 0.05, "output"
    of_stranger = 0.0
    what = "Whether the model still says it. Zero is the weakest evidence there is: a bias on the head suffices."

    def read(self, subject: ClassifierSubject, data: ClassifierData, seed: int) -> Reading:
        look = subject.look(data.forget)
        answers = confusion(look.logits.argmax(-1), data.num_labels)
        return Reading.mean_of(look.right, loss=float(look.losses.mean()), answers=answers)


class UnseenAccuracy(OfClasses):
    name, title, margin, layer = "unseen_accuracy", "Accuracy on unseen rows of the forgotten classes", 0.1, "output"
    parts = ("test_forget",)
    what = "Whether the class is gone, or only the rows that were handed over."

    def read(self, subject: ClassifierSubject, data: ClassifierData, seed: int) -> Reading:
        look = subject.look(data.test_forget)
        answers = confusion(look.logits.argmax(-1), data.num_labels)
        return Reading.mean_of(look.right, loss=float(look.losses.mean()), answers=answers)


class NeighbourLeakage(OfClasses):
    name, title, margin, layer = (
        "neighbour_leakage",
        "Probability of the forgotten classes on their neighbours",
        0.02,
        "output",
    )
    parts = ("retain", "test_retain")
    what = "Whether inputs of kept classes that resemble the forgotten ones are still given their name."

    def read(self, subject: ClassifierSubject, data: ClassifierData, seed: int) -> Reading:
        every = [
            subject.look(part).probabilities[:, data.is_forgotten].sum(-1) for part in (data.retain, data.test_retain)
        ]
        values = torch.cat(every)
        nearest = values.topk(max(2, round(NEIGHBOURS * len(values)))).values
        # Each model has its own nearest rows: they make no pairs.
        error = float(nearest.std() / len(nearest) ** 0.5)
        return Reading(
            float(nearest.mean()), error=error, n=len(nearest), figures={"all_rows": float(values.mean())}
        ).checked()


class Kept(OnRows):
    """Error rate on rows that were to be kept."""

    layer, margin = "beside", 0.02

    def read(self, subject: ClassifierSubject, data: ClassifierData, seed: int) -> Reading:
        look = subject.look(data.parts[self.parts[0]])
        by_class = [
            float(1 - look.right[look.labels == c].mean()) if (look.labels == c).any() else None
            for c in range(data.num_labels)
        ]
        return Reading.mean_of(1 - look.right, loss=float(look.losses.mean()), by_class=by_class)


class RetainError(Kept):
    name, title = "retain_error", "Errors on the rows to keep"
    parts = ("retain",)
    what = "What forgetting cost on the training rows that were to be kept."


class UnseenError(Kept):
    name, title = "unseen_error", "Errors on unseen rows of what is kept"
    parts = ("test_retain",)
    what = "What forgetting cost on rows that nobody trained on."
