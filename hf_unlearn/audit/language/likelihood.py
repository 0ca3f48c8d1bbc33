"""What a language model gives to the answers that were to go, where they are put before it: probability, memorisation, truth against falsehood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...metrics.language import forget_quality
from ...training.evaluation import FALSE
from ..check import AmongRetrained, Reading, Readings, Role, against_others
from .answers import OnRows
from .data import LanguageData
from .subject import LanguageSubject


DRAWS = 200  # of the rows, for a standard error


class GivenAnswer(OnRows):
    """A figure of the true answer's tokens."""

    layer, margin = "below", 0.05


class AnswerProbability(GivenAnswer):
    name, title, paper = "probability", "Probability of the answer", "2401.06121"
    what = "What the model gives to the true answer, normalised for its length: what it knows and does not say counts."

    def read(self, subject: LanguageSubject, data: LanguageData, seed: int) -> Reading:
        look = subject.look(data.forget)
        return Reading.mean_of(np.exp(-look.nll), loss=float(look.nll.mean()))


class ExactMemorization(GivenAnswer):
    name, title, paper = "exact_memorization", "Exact memorisation", "2506.12618"
    what = "Share of the answer's tokens that are the model's first choice after those before them."

    def read(self, subject: LanguageSubject, data: LanguageData, seed: int) -> Reading:
        return Reading.mean_of(subject.look(data.forget).exact_memorization)


class ExtractionStrength(GivenAnswer):
    name, title, paper = "extraction_strength", "Extraction strength", "2506.12618"
    what = "How much of the answer's end comes by itself once what is before it is given."

    def read(self, subject: LanguageSubject, data: LanguageData, seed: int) -> Reading:
        return Reading.mean_of(subject.look(data.forget).extraction_strength)


class OfFalseAnswers(OnRows):
    def missing(self, data: LanguageData, roles: Sequence[Role]) -> str | None:
        if not any(map(data.forget.has, FALSE)):
            return f"the forget rows have no false answers (column {FALSE[0]!r})"
        return super().missing(data, roles)


class TruthRatio(OfFalseAnswers):
    name, title, margin, layer, paper = "truth_ratio", "Truth ratio", 0.05, "below", "2401.06121"
    what = "How much likelier the true answer in other words is than false ones, as true / (true + false): ½ tells nothing apart."

    def cost(self, data: LanguageData) -> tuple[float, float]:
        name = next(filter(data.forget.has, FALSE))
        return sum(2 if isinstance(row[name], str) else 1 + len(row[name]) for row in data.forget.rows), 0

    def read(self, subject: LanguageSubject, data: LanguageData, seed: int) -> Reading:
        return Reading.mean_of(1 / (1 + subject.look(data.forget).truth_ratio))


class ForgetQuality(AmongRetrained, OfFalseAnswers):
    name, title, margin, layer, paper = (
        "forget_quality",
        "Truth ratios beside retrained ones",
        0.1,
        "distance",
        "2401.06121",
    )
    what = (
        "Largest difference between the law of the truth ratios and that under retrained models (Kolmogorov–Smirnov); beside it TOFU's forget "
        "quality, the p of that test with each of them, which few rows leave large."
    )

    def read(self, subject: LanguageSubject, data: LanguageData, seed: int) -> Reading:
        return Reading.mean_of(subject.look(data.forget).truth_ratio)

    def settled(self, readings: Readings, data: LanguageData) -> Readings:
        return against_others(readings, self.compared)

    def compared(self, one: Reading, references: Sequence[Reading]) -> Reading:
        from scipy.stats import ks_2samp

        own, others = np.array(one.per_example), np.array([reference.per_example for reference in references])
        statistic = float(ks_2samp(own, others.ravel()).statistic)
        quality = float(np.mean([forget_quality(own, other) for other in others]))
        generator = np.random.default_rng(0)
        rows = generator.integers(len(own), size=(DRAWS, len(own)))
        error = float(np.std([ks_2samp(own[chosen], others[:, chosen].ravel()).statistic for chosen in rows], ddof=1))
        return replace(one, value=statistic, per_example=None, error=error, figures={"forget_quality": quality})
