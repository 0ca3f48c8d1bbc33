"""How a classifier's answers about the forget rows lie beside those of retrained models: told apart, and membership by likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import rel_entr
from torch import nn

from ...modes import seeded_generator
from ..check import AmongRetrained, Reading, Readings, Role, against_others
from .answers import OnRows
from .data import ClassifierData
from .membership import found_at_few_alarms, unseen
from .subject import ClassifierSubject, Look


NUMBERS = 20_000  # probabilities of single rows that are kept of a model
SKETCH = 1024  # numbers that stand for all weights
TINY = 1e-12
STEPS, EPSILON = 100, (1e-2, 1e-5)  # of IAM, as its authors have them


class FromRetrained(AmongRetrained, OnRows):
    layer = "distance"

    def settled(self, readings: Readings, data: ClassifierData) -> Readings:
        return against_others(readings, self.compared)

    def compared(self, one: Reading, references: Sequence[Reading]) -> Reading:
        raise NotImplementedError


class AnswerDistance(FromRetrained):
    name, title, margin = "answer_distance", "Where forget rows are sent", 0.1
    what = (
        "Total variation between the mean answer to the forget rows and that of retrained models: over-forgetting shows here, too. Beside it, deciding nothing: KL, row by row, and how "
        "far the weights are."
    )

    def read(self, subject: ClassifierSubject, data: ClassifierData, seed: int) -> Reading:
        given = subject.look(data.forget).probabilities
        rows = given[: max(1, NUMBERS // given.shape[1])]
        figures = {"answers": given.mean(0).tolist(), "rows": rows.tolist(), "weights": sketched(subject.model)}
        return Reading(0.0, n=len(data.forget), figures=figures).checked()

    def settled(self, readings: Readings, data: ClassifierData) -> Readings:
        found = super().settled(readings, data)
        original = readings.original and readings.original.figures.get("weights")
        kept = {"rows", "weights"}  # what was compared is not told

        def told(one: Reading) -> Reading:
            figures = {name: value for name, value in one.figures.items() if name not in kept}
            away = weights_apart(one.figures.get("weights"), original)
            return replace(one, figures=figures | {"weights_from_original": away})

        return found.map(told)

    def compared(self, one: Reading, references: Sequence[Reading]) -> Reading:
        answers = np.array(one.figures["answers"])
        others = np.mean([reference.figures["answers"] for reference in references], axis=0)
        figures = dict(one.figures)
        if all("rows" in other.figures for other in (one, *references)):  # earlier readings have none
            own, mean = (
                np.array(figures["rows"]),
                np.mean([reference.figures["rows"] for reference in references], axis=0),
            )
            figures["kl"] = float(rel_entr(mean, np.maximum(own, TINY)).sum(1).mean())
            apart = [weights_apart(figures["weights"], reference.figures["weights"]) for reference in references]
            figures["weights_from_retrained"] = None if None in apart else float(np.mean(apart))
        return replace(one, value=float(np.abs(answers - others).sum() / 2), figures=figures)


def sketched(model: nn.Module) -> dict[str, Any]:
    """Weights in few numbers, of which distances are those of the weights up to 2 %: each is added to one of them, or taken off, at random."""
    parts = [(name, p.detach().float().cpu().flatten()) for name, p in sorted(model.named_parameters())]
    sketch = torch.zeros(SKETCH, dtype=torch.float64)
    for number, (_, weights) in enumerate(parts):
        generator = seeded_generator("cpu", 81, number)
        places = torch.randint(SKETCH, weights.shape, generator=generator)
        signs = torch.randint(2, weights.shape, generator=generator) * 2 - 1
        sketch.index_add_(0, places, weights.double() * signs)
    return {"of": [f"{name} {len(weights)}" for name, weights in parts], "sketch": sketch.tolist()}


def weights_apart(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> float | None:
    """Distance of two models' weights, in units of the second one's size; None where they have not the same."""
    if not one or not other or one["of"] != other["of"]:
        return None
    mine, its = (np.array(sketch["sketch"]) for sketch in (one, other))
    return float(np.linalg.norm(mine - its) / max(np.linalg.norm(its), TINY))


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


class InterpolatedMembership(FromRetrained):
    name, title, margin, layer, paper = "membership_iam", "Membership by interpolation", 0.1, "below", "2506.06112"
    what = (
        "How far each forget row's confidence lies on the way from models that never saw it to one that was trained on it (IAM): 0 where it only generalises, 1 where it is "
        "fitted. One retrained model is enough as a shadow; others sharpen it."
    )

    def read(self, subject: ClassifierSubject, data: ClassifierData, seed: int) -> Reading:
        look = subject.look(data.forget)
        return Reading.mean_of(signal(look.probabilities.gather(1, look.labels[:, None])[:, 0].numpy()))

    def settled(self, readings: Readings, data: ClassifierData) -> Readings:
        count = readings.audited.n
        fitted = np.ones(count) if readings.original is None else np.array(readings.original.per_example)

        def value(one: Reading, references: Sequence[Reading]) -> Reading:
            shadows = np.array([reference.per_example for reference in references])
            return replace(
                Reading.mean_of(interpolated(np.array(one.per_example), shadows, fitted)), seconds=one.seconds
            )

        return against_others(readings, value)


def signal(confidence: NDArray) -> NDArray[np.float64]:
    r"""$-\log(\epsilon_1 - \log(p + \epsilon_2))$, a bounded form of the map that makes confidences of Gumbel's law, from 0 at p = 0 to 1 at p = 1."""
    values = [
        -np.log(EPSILON[0] - np.log(np.asarray(p, dtype=np.float64) + EPSILON[1])) for p in (confidence, 0.0, 1.0)
    ]
    return (values[0] - values[1]) / (values[2] - values[1])


def interpolated(observed: NDArray, shadows: NDArray, fitted: NDArray) -> NDArray[np.float64]:
    r"""IAM's score of each row: $\sum_i \alpha_{i+1} F_i(r) / \sum_i \alpha_{i+1}$, with $\alpha_i$ evenly from 0 to 1 and $F_i$ Gumbel's law with the mean of the signals at
    $\alpha_i$ of the way from the shadows to who was trained on the row, and with their standard deviation over rows and shadows.

    Args:
        observed, fitted (`array`): `[n]` signals of the model in question, and of one that was trained on the rows.
        shadows (`array`): `[models, n]` of models that were not.

    Returns:
        `array`: `[n]`, in [0, 1].
    """
    alphas = np.linspace(0, 1, STEPS)
    between = shadows[:, None] + alphas[:-1, None] * (fitted - shadows)[:, None]  # [models, steps, n]
    spread = np.maximum(between.std(axis=(0, 2)), TINY)[:, None] * np.sqrt(6) / np.pi
    # Of a law with such moments, F(r) = exp(−exp(−z)).
    z = np.clip((observed - between.mean(0)) / spread + np.euler_gamma, -500, None)
    return alphas[1:] @ np.exp(-np.exp(-z)) / alphas[1:].sum()


def margins_of(look: Look) -> np.ndarray:
    """How far each row's right logit lies above all others together, `[n]`: log p/(1 − p)."""
    logits, labels = look.logits.double(), look.labels[:, None]
    own = logits.gather(1, labels)[:, 0]
    return (own - logits.scatter(1, labels, -torch.inf).logsumexp(1)).numpy()
