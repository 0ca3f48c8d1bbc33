"""Membership: whether the forget rows still look like rows that a language model was trained on, beside rows that none was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ...metrics.language import privleak
from ..check import AmongRetrained, Reading, Readings, Role, against_others
from .answers import OnRows
from .data import LanguageData, Part
from .subject import LanguageSubject, losses


GRADIENTS = 100  # rows of a part of which gradients are taken, at most


class Membership(OnRows):
    """An attacker who says "member" where a score is low: the area under the curve, ½ where the score tells nothing."""

    unit, margin, layer = "AUC", 0.1, "below"
    parts = ("forget", "test")
    score = ""

    def missing(self, data: LanguageData, roles: Sequence[Role]) -> str | None:
        few = len(data.forget) < 2 or len(data.test) == 1
        return super().missing(data, roles) or ("a single row has no law" if few else None)

    def read(self, subject: LanguageSubject, data: LanguageData, seed: int) -> Reading:
        members, others = (self.scores(subject, part, seed) for part in (data.forget, data.test))
        return Reading.auc_of(-members, -others)

    def scores(self, subject: LanguageSubject, part: Part, seed: int) -> np.ndarray:
        return getattr(subject.look(part), self.score)


class MembershipByLoss(Membership):
    name, title, score = "membership_loss", "Membership by loss", "nll"
    what = "Whether the loss tells forget rows from rows like them that no model saw. Where those are others by content, it tells that too: only what is beyond retrained models counts."


class MembershipByZlib(Membership):
    name, title, score, paper = "membership_zlib", "Membership by loss over compressed length", "zlib", "2012.07805"
    what = "As by loss, which is compared with what any compressor finds simple."


class MembershipByMinK(Membership):
    name, title, score, paper = "membership_min_k", "Membership by Min-K %", "min_k", "2310.16789"
    what = "As by loss, of each answer's least likely tokens; beside it MUSE's privleak, in percent of the retrained models' failure."

    def settled(self, readings: Readings, data: LanguageData) -> Readings:
        return against_others(readings, self.leak) if len(readings.retrained) > 1 else readings

    def leak(self, one: Reading, references: Sequence[Reading]) -> Reading:
        mean = float(np.mean([reference.value for reference in references]))
        return replace(one, figures={**one.figures, "privleak": privleak(one.value, mean)})


class MembershipByMinKPlusPlus(Membership):
    name, title, score, paper = (
        "membership_min_k_plus_plus",
        "Membership by Min-K %++",
        "min_k_plus_plus",
        "2404.02936",
    )
    what = "As by Min-K %, each token beside the others that could have stood there."


class MembershipByReference(AmongRetrained, Membership):
    name, title, paper = "membership_reference", "Membership by loss beside retrained models", "2012.07805"
    what = "As by loss, of which the mean over retrained models is taken off: what makes a row hard by itself does not count."

    def read(self, subject: LanguageSubject, data: LanguageData, seed: int) -> Reading:
        return Reading.mean_of(subject.look(data.forget).nll, unseen=subject.look(data.test).nll.tolist())

    def settled(self, readings: Readings, data: LanguageData) -> Readings:
        return against_others(readings, self.compared)

    def compared(self, one: Reading, references: Sequence[Reading]) -> Reading:
        members = np.array(one.per_example) - np.mean([reference.per_example for reference in references], axis=0)
        others = np.array(one.figures["unseen"]) - np.mean([each.figures["unseen"] for each in references], axis=0)
        return replace(Reading.auc_of(-members, -others), seconds=one.seconds)


class MembershipByGradient(Membership):
    name, title = "membership_gradient", "Membership by the gradient's norm"
    what = (
        "What was learnt by heart has nothing more to teach: the norm of the gradient of a row's loss in all weights."
    )

    def cost(self, data: LanguageData) -> tuple[float, float]:
        return 0, min(GRADIENTS, len(data.forget)) + min(GRADIENTS, len(data.test))

    def scores(self, subject: LanguageSubject, part: Part, seed: int) -> np.ndarray:
        model = subject.copy()
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norms = []
        for row in sorted(part.order(seed, 43)[:GRADIENTS]):
            gradients = torch.autograd.grad(losses(model, part.select([row])).mean(), weights, allow_unused=True)
            norms.append(sum(float(one.double().square().sum()) for one in gradients if one is not None) ** 0.5)
        return np.array(norms)
