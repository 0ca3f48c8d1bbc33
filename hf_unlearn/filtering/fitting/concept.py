"""One concept of a filter: who is fitted to, who is held out, its score, its threshold and what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from ...data import check_marks
from ...metrics.moments import Moments
from ..scores import Basis, Score, ScoreBank
from . import forms
from .background import Background
from .rates import Rate, prevalence_from, release_of, residual_of
from .thresholds import Threshold, max_false_alarm, min_recall, pooled_mean


Array = NDArray[np.float64]

FEWEST = 2  # undesired marks
FEWEST_UNMARKED = 100  # for a covariance
LARGEST = 4096  # dimensions whose covariance is computed
FOLDS = 10
ROUNDING = 1e-5  # of the largest score


@dataclass(frozen=True)
class FilterFigures:
    """What is known of one concept's filter.

    Args:
        undesired, clean, unmarked (`int`): samples it was made from, calibration included.
        auc (`float`, *optional*): chance that an undesired mark scores above a clean (or else unmarked) sample.
        recall ([`Rate`], *optional*): share of undesired samples that is blocked. Of marks that a score which has not seen
            them judges: held out for calibration, or in turn (cross-validation; then the interval is approximate).
        false_alarm ([`Rate`], *optional*): share of clean samples that is blocked, likewise.
        blocked ([`Rate`], *optional*): share of unmarked samples that is blocked.
        prevalence ([`Rate`], *optional*): share of undesired samples among unmarked ones, as given or from the three above.
        release ([`Rate`], *optional*): share of all samples that is released.
        residual ([`Rate`], *optional*): share of undesired samples among those that are released.
        recall_from, false_alarm_from (`str`, *optional*): `"calibration"` or `"cross-validation"`. What the threshold was
            calibrated on is at that threshold what the promise allows it to be, by construction: its interval holds, its value
            is a little low (false alarms) or high (recall).
    """

    undesired: int
    clean: int
    unmarked: int
    auc: float | None = None
    recall: Rate | None = None
    false_alarm: Rate | None = None
    blocked: Rate | None = None
    prevalence: Rate | None = None
    release: Rate | None = None
    residual: Rate | None = None
    recall_from: str | None = None
    false_alarm_from: str | None = None


@dataclass(frozen=True, eq=False)
class FilteredConcept:
    """One concept of a filter.

    Args:
        name, description (`str`): for people.
        score ([`Score`]): high for what is undesired.
        threshold ([`Threshold`]): with what it promises.
        figures ([`FilterFigures`]): as measured on the marks.
    """

    name: str
    description: str
    score: Score
    threshold: Threshold
    figures: FilterFigures


@dataclass(frozen=True)
class Samples:
    """What one concept is fitted to, as embeddings `[n, d]`.

    Args:
        undesired, clean (array): marks.
        pool ([`Background`], *optional*): of unmarked samples.
        basis ([`Basis`], *optional*): of the pool, where it is large enough for one.
        latents (`bool`): whether the embeddings are a generator's own latents.
    """

    undesired: Array
    clean: Array
    pool: Background | None
    basis: Basis | None
    latents: bool


@dataclass(frozen=True)
class Settings:
    """How: see [`FASTFitter`] and [`~FASTFitter.fit`]."""

    score: str
    components: int
    calibration_share: float
    seed: int
    threshold: str
    rate: float | None
    confidence: float
    max_prevalence: float | None
    prevalence: float | None
    augment: int


class ConceptFit:
    """Fits one concept.

    Raises:
        ValueError: too few marks, both kinds the same, or too many dimensions for the score.
    """

    def __init__(self, name: str, description: str, samples: Samples, settings: Settings):
        self.name, self.description, self.samples, self.settings = name, description, samples, settings
        marks = len(samples.undesired)
        if marks < FEWEST:
            raise ValueError(f"{name}: has {marks} undesired marks; mark at least {FEWEST}, better 20")
        check_marks(samples.undesired, samples.clean, name)
        dimension = samples.undesired.shape[1]
        if settings.score in ("quadratic", "lda") and dimension > LARGEST:
            raise ValueError(
                f"score={settings.score!r}: needs the covariance of {dimension} numbers, {LARGEST} at most; pass an "
                "encoder, or score='mean_difference'"
            )
        self._set_aside()
        self._basis = self._background_basis() if settings.score == "quadratic" else None

    def _set_aside(self) -> None:
        """Hold out what the threshold is calibrated on, and give the rest to the score."""
        samples, rule = self.samples, self.settings
        none = samples.clean[:0]
        # A score that is fitted against the pool leaves every clean mark for calibration.
        if samples.basis is not None:
            self.clean, self.held_clean = none, samples.clean
        elif rule.threshold == "max_false_alarm" and rule.max_prevalence is None:
            self.clean, self.held_clean = self._parted(samples.clean, 0)
        else:
            self.clean, self.held_clean = samples.clean, none
        self.undesired, self.held_undesired = samples.undesired, samples.undesired[:0]
        if rule.threshold == "min_recall":
            self.undesired, self.held_undesired = self._parted(samples.undesired, 1)
            if len(self.undesired) < FEWEST:
                raise ValueError(f"{self.name}: min_recall needs marks for fitting and for calibration; mark more")

    def _parted(self, rows: Array, which: int) -> tuple[Array, Array]:
        order = np.random.default_rng([self.settings.seed, 3 + which]).permutation(len(rows))
        held = round(self.settings.calibration_share * len(rows))
        return rows[np.sort(order[held:])], rows[np.sort(order[:held])]

    def _stand_ins(self, undesired: Array) -> Array:
        """The paper's, for clean marks that a linear score or the paper's threshold needs and nobody gave."""
        if self.samples.pool is None or not len(self.samples.pool.fitting):
            raise ValueError(f"{self.name}: has no clean marks; pass clean=, or unmarked= to draw stand-ins from")
        factor = 0.5 if self.samples.latents else 1.0
        return forms.pseudo_clean(undesired, self.samples.pool.fitting.rows, factor=factor, seed=self.settings.seed)

    def _background_basis(self) -> Basis:
        if self.samples.basis is not None:
            return self.samples.basis
        if len(self.clean) < FEWEST_UNMARKED:
            found = max(len(self.clean), len(self.samples.pool.fitting) if self.samples.pool else 0)
            raise ValueError(
                f"unmarked: score='quadratic' needs {FEWEST_UNMARKED} samples to fit against, there are {found} for it; let "
                "the generator draw more, or choose score='lda'"
            )
        moments = Moments(self.clean.shape[1])
        moments.update(self.clean)
        return forms.basis_of(moments, self.settings.components)

    def _fitted(self, undesired: Array, clean: Array) -> Score:
        if self._basis is not None:
            return forms.quadratic(undesired, self._basis)
        if not len(clean):
            clean = self._stand_ins(undesired)
        if self.settings.augment:
            undesired = forms.augmented(undesired, self.settings.augment, seed=self.settings.seed)
            clean = forms.augmented(clean, self.settings.augment, seed=self.settings.seed + 1)
        return getattr(forms, self.settings.score)(undesired, clean)

    def result(self) -> FilteredConcept:
        """The score, its threshold and its figures."""
        score = self._fitted(self.undesired, self.clean)
        bank = ScoreBank.of([score])

        def scored(rows: Array) -> Array:
            # In fp32, by the very code that will judge.
            return bank(torch.from_numpy(np.asarray(rows, np.float32)))[:, 0].double().numpy()

        threshold = self._threshold(scored)
        crossed = _cross_validated(self._fitted, self.undesired, self.clean, self.settings.seed)
        figures = self._figures(scored, threshold, *crossed)
        return FilteredConcept(self.name, self.description, score, threshold, figures)

    def _threshold(self, scored: Callable[[Array], Array]) -> Threshold:
        rule, pool = self.settings, self.samples.pool
        if rule.threshold == "pooled_mean":
            clean = self.samples.clean if len(self.samples.clean) else self._stand_ins(self.undesired)
            return pooled_mean(scored(self.undesired), scored(clean), concept=self.name)
        if rule.threshold == "min_recall":
            scores = scored(self.held_undesired)
            return _outwards(min_recall(scores, rule.rate, rule.confidence, concept=self.name), -_rounding(scores))
        held = self.held_clean
        if rule.max_prevalence is not None:
            held = held[:0] if pool is None else pool.calibration.rows
        elif not len(held):
            raise ValueError(
                f"{self.name}: max_false_alarm is calibrated on clean marks, and there are none; pass clean=, or "
                "max_prevalence= to calibrate on unmarked samples, or another threshold"
            )
        scores = scored(held)
        threshold = max_false_alarm(
            scores, rule.rate, rule.confidence, max_prevalence=rule.max_prevalence, concept=self.name
        )
        return _outwards(threshold, _rounding(scores))

    def _figures(
        self, scored: Callable[[Array], Array], threshold: Threshold, crossed_undesired: Array, crossed_clean: Array
    ) -> FilterFigures:
        tau, pool = threshold.value, self.samples.pool
        undesired = scored(self.held_undesired) if len(self.held_undesired) else crossed_undesired
        clean = scored(self.held_clean) if len(self.held_clean) else crossed_clean
        unmarked = np.zeros(0) if pool is None else scored(pool.calibration.rows)
        recall, false_alarm, blocked = (
            Rate.counted((values > tau).sum(), len(values)) for values in (undesired, clean, unmarked)
        )
        prevalence = None
        if self.settings.prevalence is not None:
            prevalence = Rate(*[self.settings.prevalence] * 3)
        elif blocked and recall and false_alarm:
            prevalence = prevalence_from(blocked, recall, false_alarm)
        known = prevalence and recall and false_alarm
        release = None
        if blocked:
            release = blocked.complement
        elif known:
            release = release_of(prevalence, recall, false_alarm)
        others = clean if len(clean) else unmarked
        auc = None
        if len(undesired) and len(others):
            marks = np.arange(len(undesired) + len(others)) < len(undesired)
            auc = float(roc_auc_score(marks, np.concatenate([undesired, others])))
        return FilterFigures(
            undesired=len(self.samples.undesired),
            clean=len(self.samples.clean),
            unmarked=0 if pool is None else pool.fitting.seen + pool.calibration.seen,
            auc=auc,
            recall=recall,
            false_alarm=false_alarm,
            blocked=blocked,
            prevalence=prevalence,
            release=release,
            residual=residual_of(prevalence, recall, false_alarm) if known else None,
            recall_from="calibration" if len(self.held_undesired) else "cross-validation",
            false_alarm_from=None if not len(clean) else "calibration" if len(self.held_clean) else "cross-validation",
        )


def _cross_validated(fitted, undesired: Array, clean: Array, seed: int) -> tuple[Array, Array]:
    """Scores of every fitted mark by a score that has not seen it."""
    folds = min(FOLDS, len(undesired))
    scores = [np.full(len(rows), np.nan) for rows in (undesired, clean)]
    order = [np.random.default_rng([seed, 5]).permutation(len(rows)) % folds for rows in (undesired, clean)]
    for fold in range(folds):
        left_out = [numbers == fold for numbers in order]
        rows = [kind[~out] for kind, out in zip((undesired, clean), left_out, strict=True)]
        if len(rows[0]) < FEWEST or (len(clean) and not len(rows[1])):
            continue
        try:
            score = fitted(*rows)
        except ValueError:  # no stand-ins for so few marks
            continue
        for values, kind, out in zip(scores, (undesired, clean), left_out, strict=True):
            if out.any():
                values[out] = score(kind[out])
    return tuple(values[np.isfinite(values)] for values in scores)


def _rounding(scores: Array) -> float:
    """What scores in fp32 may differ by from one batch, or number of concepts, to another."""
    return ROUNDING * float(np.abs(scores).max()) if len(scores) else 0.0


def _outwards(threshold: Threshold, margin: float) -> Threshold:
    """Moved so far to the side on which the promise holds that rounding cannot take a tie across the line."""
    return replace(threshold, value=float(np.float32(threshold.value + margin)))
