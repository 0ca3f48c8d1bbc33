"""What else forgetting cost a language model: told beside, and not judged."""

from __future__ import annotations

from ...training.evaluation import compare
from ..check import Reading
from .answers import OnRows
from .data import LanguageData
from .subject import LanguageSubject


class UtilityLost(OnRows):
    name, title, margin, layer, paper = (
        "utility_lost",
        "Utility lost on the rows to keep",
        0.02,
        "beside",
        "2401.06121",
    )
    parts = ("forget", "retain")
    what = "One minus the harmonic mean of probability, ROUGE-L recall and, where there are false answers, truth ratio on retained rows."

    def cost(self, data: LanguageData) -> tuple[float, float]:
        return data.written * len(data.kept), 0

    def read(self, subject: LanguageSubject, data: LanguageData, seed: int) -> Reading:
        look = subject.look(data.kept)
        utility = compare(subject.look(data.forget), kept=[look])["model_utility"]
        return Reading(1 - utility, n=len(data.kept), figures=look.summary()).checked()


class UnseenLoss(OnRows):
    name, title, unit, margin, layer = "unseen_loss", "Loss of unseen rows", "nats", 0.05, "beside"
    parts = ("test",)
    what = "What forgetting cost on texts that nobody trained on."

    def read(self, subject: LanguageSubject, data: LanguageData, seed: int) -> Reading:
        return Reading.mean_of(subject.look(data.test).nll)
