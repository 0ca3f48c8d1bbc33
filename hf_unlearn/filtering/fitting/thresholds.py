"""Where a filter draws its line, and what may be promised about it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom


Array = NDArray[np.float64]
Rule = Literal["max_false_alarm", "min_recall", "pooled_mean", "fixed"]
RULES: tuple[str, ...] = get_args(Rule)


@dataclass(frozen=True)
class Threshold:
    """A sample is released if its score is finite and not above `value`.

    Args:
        value (`float`): τ.
        rule (`str`): how it was found.
        rate (`float`, *optional*): the bound asked for: α of `max_false_alarm`, least recall of `min_recall`.
        confidence (`float`, *optional*): 1 − δ, over the draw of the calibration sample.
        calibrated_on (`str`, *optional*): `"clean"` or `"undesired"` marks, or `"unmarked"` samples.
        calibration_samples (`int`): how many.
        max_prevalence (`float`, *optional*): of what is undesired among unmarked samples, as the user bounded it.
    """

    value: float
    rule: str
    rate: float | None = None
    confidence: float | None = None
    calibrated_on: str | None = None
    calibration_samples: int = 0
    max_prevalence: float | None = None

    @property
    def promise(self) -> str | None:
        """What holds, in words; None where nothing is promised."""
        if self.confidence is None:
            return None
        sample = f"{self.calibration_samples} {self.calibrated_on} samples that were not used in fitting"
        if self.calibrated_on == "unmarked":
            sample += f", if at most {100 * self.max_prevalence:g} % of what is drawn is undesired"
        what = (
            f"at most {100 * self.rate:g} % of clean samples are blocked"
            if self.rule == "max_false_alarm"
            else f"at least {100 * self.rate:g} % of undesired samples are blocked"
        )
        return f"{what}, with confidence {100 * self.confidence:g} % over the draw of {sample}"


def allowed_exceedances(samples: int, rate: float, confidence: float) -> int:
    r"""The largest j with P(Bin(n, α) ≤ j) ≤ δ; −1 if there is none.

    If the threshold is the (n − j)-th smallest of n scores, j of them lie above it, and the law lets more than α lie above
    with a probability of at most δ over the draw of the n: a tolerance limit (Wilks, 1941).
    """
    j = int(binom.ppf(1 - confidence, samples, rate))
    while j >= 0 and binom.cdf(j, samples, rate) > 1 - confidence:
        j -= 1
    return j


def samples_needed(rate: float, confidence: float) -> int:
    """n ≥ ln δ / ln(1 − α): below it no threshold keeps the promise. 59 for α = δ = 0.05."""
    return math.ceil(round(math.log(1 - confidence) / math.log1p(-rate), 9))


def max_false_alarm(
    scores: Array, rate: float, confidence: float, *, max_prevalence: float | None = None, concept: str = "undesired"
) -> Threshold:
    """τ that blocks at most a share `rate` of clean samples, with a confidence over the draw of `scores`.

    Args:
        scores (array): `[n]`, of clean samples that were not used in fitting; or of unmarked ones, with `max_prevalence`.
        rate (`float`): α, in (0, 1).
        confidence (`float`): 1 − δ, in (0, 1).
        max_prevalence (`float`, *optional*): at most so many of the samples are undesired. Whichever these are, at most
            α (1 − π) of all samples may then be blocked: since q ≥ (1 − π) a, the promise holds for any of them.

    Raises:
        ValueError: too few samples for what is asked, or scores that are not finite.
    """
    scores = _finite(scores, concept)
    kind, allowed = ("clean", rate) if max_prevalence is None else ("unmarked", rate * (1 - max_prevalence))
    j = allowed_exceedances(len(scores), allowed, confidence)
    if j < 0:
        raise ValueError(
            f"{concept}: max_false_alarm={rate:g} with confidence {confidence:g} needs {samples_needed(allowed, confidence)} "
            f"{kind} calibration samples, there are {len(scores)}; {'mark' if kind == 'clean' else 'draw'} more, or ask for less"
        )
    value = float(np.partition(scores, len(scores) - 1 - j)[len(scores) - 1 - j])
    return Threshold(value, "max_false_alarm", rate, confidence, kind, len(scores), max_prevalence)


def min_recall(scores: Array, rate: float, confidence: float, *, concept: str = "undesired") -> Threshold:
    """τ that blocks at least a share `rate` of undesired samples, with a confidence over the draw of `scores`.

    Args:
        scores (array): `[n]`, of undesired marks that were not used in fitting.
        rate (`float`): in (0, 1).
        confidence (`float`): 1 − δ, in (0, 1).

    Raises:
        ValueError: too few marks for what is asked, or scores that are not finite.
    """
    scores = _finite(scores, concept)
    j = allowed_exceedances(len(scores), 1 - rate, confidence)
    if j < 0:
        raise ValueError(
            f"{concept}: min_recall={rate:g} with confidence {confidence:g} needs {samples_needed(1 - rate, confidence)} "
            f"undesired calibration samples, there are {len(scores)}; mark more, or ask for less"
        )
    # Blocked is what lies above: just below the (j + 1)-th smallest.
    value = float(np.nextafter(np.float32(np.partition(scores, j)[j]), np.float32(-np.inf)))
    return Threshold(value, "min_recall", rate, confidence, "undesired", len(scores))


def pooled_mean(undesired: Array, clean: Array, *, concept: str = "undesired") -> Threshold:
    """The paper's τ: the mean score of all marks. It promises nothing."""
    pooled = np.concatenate([_finite(undesired, concept), _finite(clean, concept)])
    return Threshold(float(pooled.mean()), "pooled_mean")


def _finite(scores: Array, concept: str) -> Array:
    scores = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(scores).all():
        raise ValueError(f"{concept}: a score is not finite; remove samples with NaN or infinite values")
    return scores
