"""Classifiers of images and texts, as an audit knows them: their rows, their checks, and what a look at one costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ...training.models import head_of, is_causal_lm
from ..check import Check, Role
from ..functions import Functions
from ..store import Store
from .answers import ForgetAccuracy, NeighbourLeakage, RetainError, UnseenAccuracy, UnseenError
from .data import EXAMPLES, ClassifierData, classifier_data
from .depth import LinearProbe, RefittedHead
from .distances import AnswerDistance, InterpolatedMembership, MarginDivergence, MembershipByLikelihood
from .disturbed import Noisy, Pruned, Quantised
from .membership import MembershipByEntropy, MembershipByLoss
from .relearning import RelearnBesideNew, RelearnForget, RelearnRetained, RelearnUnrelated
from .shadows import ROWS, SwapTest, UnlearningLiRA, trials
from .subject import ClassifierSubject, pace


NAME = "classifier"
QUICK: tuple[type[Check], ...] = (
    ForgetAccuracy, UnseenAccuracy, NeighbourLeakage, RefittedHead, Quantised, MembershipByLoss, RetainError, UnseenError,
)  # fmt: skip
STANDARD: tuple[type[Check], ...] = (
    ForgetAccuracy, UnseenAccuracy, NeighbourLeakage, LinearProbe, RefittedHead, RelearnForget, RelearnRetained, RelearnUnrelated, Quantised,
    Pruned, Noisy, MembershipByLoss, MembershipByEntropy, MembershipByLikelihood, SwapTest, UnlearningLiRA, AnswerDistance, MarginDivergence, RetainError,
    UnseenError,
)  # fmt: skip
# Beside them what asks almost the same again: every check widens the margins of all.
EVERY: tuple[type[Check], ...] = (*STANDARD, RelearnBesideNew, InterpolatedMembership)


def fits(model: Any) -> bool:
    return hasattr(getattr(model, "config", None), "num_labels") and not is_causal_lm(model)


def subject(model: nn.Module, role: Role, name: str) -> ClassifierSubject:
    return ClassifierSubject(model, role, name)


def check_alike(audited: ClassifierSubject, other: ClassifierSubject, argument: str) -> None:
    """Refuse a model with other classes.

    Raises:
        ValueError: naming the argument.
    """
    one, two = (subject.model.config for subject in (audited, other))
    if one.num_labels != two.num_labels:
        raise ValueError(
            f"{argument}: has {two.num_labels} classes, the audited model {one.num_labels}; pass models of one label set"
        )
    names = [getattr(config, "id2label", None) or {} for config in (one, two)]
    differ = [number for number in names[0] if names[1].get(number) != names[0][number]]
    if differ:
        raise ValueError(
            f"{argument}: calls class {differ[0]} {names[1].get(differ[0])!r}, the audited model {names[0][differ[0]]!r}; pass models of one label set"
        )


def data(
    audited: ClassifierSubject, forget: Any, retain: Any, test: Any, *, processing_class: Any, size: str, seed: int
) -> ClassifierData:
    head_of(audited.model)
    labels = audited.model.config.num_labels
    return classifier_data(
        forget, retain, test, num_labels=labels, processing_class=processing_class, size=size, seed=seed
    )


def with_trials(
    rows: ClassifierData,
    audited: ClassifierSubject,
    functions: Functions,
    shadows: Any,
    *,
    processing_class: Any,
    size: str,
    store: Store,
) -> ClassifierData:
    """The rows with shadow models to try the way to unlearn on.

    Raises:
        ValueError: see [`trials`].
    """
    config = audited.model.config

    def alike(other: ClassifierSubject, argument: str) -> None:
        if other.model.config.num_labels != config.num_labels:
            raise ValueError(
                f"{argument}: has {other.model.config.num_labels} classes, the audited model {config.num_labels}; pass models of one label set"
            )

    found = trials(
        audited, functions, shadows, check_alike=alike, processing_class=processing_class, limit=EXAMPLES[size], store=store,
    )  # fmt: skip
    few = f"needs {ROWS} forget rows, to train shadow models on halves of them"
    return replace(rows, trials=found, no_trials=few)


def forget_loss(one: ClassifierSubject, rows: ClassifierData) -> float:
    """The statistic of residual μ: mean cross-entropy of the forget rows, in nats."""
    return float(one.look(rows.forget).losses.mean())


def cost(one: ClassifierSubject, rows: ClassifierData) -> tuple[float, float]:
    """Seconds of an example forward, and in training."""
    return pace(one, rows)
