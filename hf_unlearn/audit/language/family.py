"""Causal language models, as an audit knows them: their rows, their checks, and what a look at one costs."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...training.models import is_causal_lm
from ..check import Check, Role
from .answers import AskedAgain, RougeOfAnswer, Sampled, ToldGreedily
from .attacks import AnswerBegun, AskedAfterExamples, AskedOutOfOrder
from .data import LanguageData, language_data
from .depth import LogitLens
from .disturbed import Pruned, Quantised
from .kept import UnseenLoss, UtilityLost
from .likelihood import AnswerProbability, ExactMemorization, ExtractionStrength, ForgetQuality, TruthRatio
from .membership import (
    MembershipByGradient,
    MembershipByLoss,
    MembershipByMinK,
    MembershipByMinKPlusPlus,
    MembershipByReference,
    MembershipByZlib,
)
from .relearning import RelearnFew, RelearnFewLora, RelearnRetained, RelearnUnrelated
from .subject import LanguageSubject, pace, room_of


NAME = "language model"
QUICK: tuple[type[Check], ...] = (
    ToldGreedily, AskedAgain, AnswerBegun, AnswerProbability, ExtractionStrength, TruthRatio, MembershipByMinKPlusPlus, Quantised, UtilityLost,
    UnseenLoss,
)  # fmt: skip
STANDARD: tuple[type[Check], ...] = (
    ToldGreedily, RougeOfAnswer, AskedAgain, Sampled, AskedAfterExamples, AnswerBegun, AnswerProbability, ExactMemorization, ExtractionStrength,
    TruthRatio, LogitLens, MembershipByMinK, MembershipByMinKPlusPlus, MembershipByReference, RelearnRetained, RelearnUnrelated, RelearnFew,
    Quantised, Pruned, ForgetQuality, UtilityLost, UnseenLoss,
)  # fmt: skip
# Beside them what costs more, and what asks almost the same again: every check widens the margins of all.
EVERY: tuple[type[Check], ...] = (
    *STANDARD, AskedOutOfOrder, MembershipByLoss, MembershipByZlib, MembershipByGradient, RelearnFewLora,
)  # fmt: skip


def fits(model: Any) -> bool:
    return is_causal_lm(model)


def subject(model: nn.Module, role: Role, name: str) -> LanguageSubject:
    return LanguageSubject(model, role, name)


def check_alike(audited: LanguageSubject, other: LanguageSubject, argument: str) -> None:
    """Refuse a model with another vocabulary.

    Raises:
        ValueError: naming the argument.
    """
    one, two = (subject.model.get_input_embeddings().weight.shape[0] for subject in (audited, other))
    if one != two:
        raise ValueError(f"{argument}: knows {two:,} tokens, the audited model {one:,}; pass models of one tokenizer")


def data(
    audited: LanguageSubject, forget: Any, retain: Any, test: Any, *, processing_class: Any, size: str, seed: int
) -> LanguageData:
    """The rows of an audit.

    Raises:
        ValueError: rows that the models cannot read; see [`language_data`].
    """
    rows = language_data(forget, retain, test, processing_class=processing_class, size=size, seed=seed)
    room, known = room_of(audited.model), audited.model.get_input_embeddings().weight.shape[0]
    for name, part in rows.parts.items():
        for answer in part.answers:
            if len(answer.ids) > room:
                raise ValueError(
                    f"{name}: a row of {len(answer.ids):,} tokens is longer than the {room:,} that the model reads; shorten or split it"
                )
            if max(answer.ids) >= known:
                raise ValueError(
                    f"processing_class: gives token {max(answer.ids)}, but the models know {known:,}; pass their tokenizer"
                )
    return rows


def forget_loss(one: LanguageSubject, rows: LanguageData) -> float:
    """The statistic of residual μ: mean negative log-likelihood of the forgotten answers, in nats."""
    return float(one.look(rows.forget).nll.mean())


def cost(one: LanguageSubject, rows: LanguageData) -> tuple[float, float]:
    """Seconds of an example forward, and in training."""
    return pace(one, rows)
