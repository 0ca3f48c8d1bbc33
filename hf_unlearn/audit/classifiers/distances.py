"""How a classifier's answers about the forget rows lie beside those of retrained models: told apart, and membership by likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..check import Reading, Readings, Role, against_others
from .answers import OnRows
from .data import ClassifierData
from .membership import found_at_few_alarms, unseen
from .subject import ClassifierSubject, Look


class FromRetrained(OnRows):
    """A check whose value is a comparison with retrained models, each of which is compared with the others."""

    layer = "distance"

    def missing(self, data: ClassifierData, roles: Sequence[Role]) -> str | None:
        few = roles.count("retrained") < 3
        return "needs 3 retrained models, to compare each with the others" if few else super().missing(data, roles)

    def settled(self, readings: Readings, data: ClassifierData) -> Readings:
        return against_others(readings, self.compared)

    def compared(self, one: Reading, references: Sequence[Reading]) -> Reading:
        raise NotImplementedError


class AnswerDistance(FromRetrained):
    name, title, margin = "answer_distance", "Where forget rows are sent", 0.1
    what = "Total variation between the mean answer to the forget rows and that of retrained models: over-forgetting shows here, too."

    def read(self, subject: ClassifierSubject, data: ClassifierData, seed: int) -> Reading:
        mean = subject.look(data.forget).probabilities.mean(0)
        return Reading(0.0, n=len(data.forget), figures={"answers": mean.tolist()}).checked()

    def compared(self, one: Reading, references: Sequence[Reading]) -> Reading:
        answers = np.array(one.figures["answers"])
        others = np.mean([reference.figures["answers"] for reference in references], axis=0)
        return replace(one, value=float(np.abs(answers - others).sum() / 2))


class MarginDivergence(FromRetrained):
    name, title, unit, margin, paper = "margin_divergence", "Divergence of logit margins", "nats", 1.0, "2410.23232"
    what = "KL of each forget row's logit margin from its law over retrained models (KLoM), for one model: half the square of its shift in their spread."

    def read(self, subject: ClassifierSubject, data: ClassifierData, seed: int) -> Reading:
        return Reading.mean_of(margins_of(subject.look(data.forget)))

    def compared(self, one: Reading, references: Sequence[Reading]) -> Reading:
        margins = np.array([reference.per_example for reference in references])
        # So few models tell little of the spread of a single row: one for all.
        spread = margins.var(axis=0, ddof=1).mean()
        shift = np.array(one.per_example) - margins.mean(0)
        divergence = shift**2 / (2 * spread * (1 + 1 / len(references)))
        return replace(one, value=float(divergence.mean()), per_example=tuple(divergence.tolist()))


class MembershipByLikelihood(FromRetrained):
    name, title, unit, margin, layer = "membership_lira", "Membership by likelihood ratio", "AUC", 0.1, "below"
    paper = "2112.03570"
    what = (
        "Whether the logit margins of forget rows lie farther above their law over models that never saw them than those of unseen rows do "
        "(LiRA, offline: retrained models are its shadows)."
    )

    def missing(self, data: ClassifierData, roles: Sequence[Role]) -> str | None:
        few = len(unseen(data)) < 2
        return "there are no unseen rows to compare with" if few else super().missing(data, roles)

    def read(self, subject: ClassifierSubject, data: ClassifierData, seed: int) -> Reading:
        others = margins_of(subject.look(unseen(data)))
        return replace(Reading.mean_of(margins_of(subject.look(data.forget))), figures={"unseen": others.tolist()})

    def compared(self, one: Reading, references: Sequence[Reading]) -> Reading:
        members = np.array(one.per_example) - np.mean([reference.per_example for reference in references], axis=0)
        others = np.array(one.figures["unseen"]) - np.mean(
            [reference.figures["unseen"] for reference in references], axis=0
        )
        # One spread for all rows changes no order, so it is left out.
        return replace(Reading.auc_of(members, others, **found_at_few_alarms(members, others)), seconds=one.seconds)


def margins_of(look: Look) -> np.ndarray:
    """How far each row's right logit lies above all others together, `[n]`: log p/(1 − p)."""
    logits, labels = look.logits.double(), look.labels[:, None]
    own = logits.gather(1, labels)[:, 0]
    return (own - logits.scatter(1, labels, -torch.inf).logsumexp(1)).numpy()
