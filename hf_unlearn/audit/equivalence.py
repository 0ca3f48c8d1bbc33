r"""How far the audited model is from retrained ones, with intervals and margins.

Of a check with readings $r_1 … r_R$ of retrained models and $a$ of the audited one, the distance is $D = a - \bar r$. Its interval
joins what the examples leave open (exact where they are right or wrong, else Student's t of the paired differences) and what so few
references leave open ($t_{R-1}\, s/\sqrt R$), each bound by itself (Zou and Donner's MOVER). The margin is what was stated plus what
retrained models differ among each other,

$$ M = m + s \left( t_{R-1, 1-\alpha/K} \sqrt{1 + 1/R} + t_{R-1, 1-\alpha} / \sqrt R \right), $$

so that one more retrained model is within all K margins in 95 audits of 100. *Beyond* is a lower bound above M, *within* an upper bound
up to M. With few references M is wide: a check whose margin hides the original itself, which endless references would tell apart, is *blind*, and that is
not passed. (Where the original lies among retrained models, $D_o \le m + z_{1-\alpha/K}\, s$, there is nothing to see by that check.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from .check import Reading, Readings


CONFIDENCE = 0.95  # of each bound by itself; the two of an interval hold together in 90 of 100
Status = Literal["beyond", "within", "blind", "unclear", "unknown"]


@dataclass(frozen=True)
class Comparison:
    """The audited model beside retrained ones (or beside what is known of a class never seen) in one check.

    Args:
        distance, low, high, margin (`float`, *optional*): D with its bounds, and M. None where there is nothing to compare with.
        status (`str`): `"beyond"`, `"within"`, `"blind"`, `"unclear"` or `"unknown"`.
        sees (`bool`, *optional*): whether the original is beyond the margin: whether the check would notice memory. False without it, None where nothing
            is known.
    """

    distance: float | None
    low: float | None
    high: float | None
    margin: float | None
    status: Status
    sees: bool | None = None


def compared(
    readings: Readings,
    margin: float,
    checks: int,
    *,
    never_seen: float | None = None,
    by_construction: float | None = None,
) -> Comparison:
    """[`Comparison`] of a check's readings.

    Args:
        margin (`float`): the stated one, m.
        checks (`int`): K, of all that take part in the verdict.
        never_seen (`float`, *optional*): value of a model that never saw a forgotten class; used below two references, and then proves
            memory but not its absence.
        by_construction (`float`, *optional*): value of retrained models, which need not be asked: there is no spread, and the margin is the stated one.
    """
    references, audited = readings.retrained, readings.audited
    if by_construction is not None:
        down, up = sampling_error(audited, ())
        distance = audited.value - by_construction
        status = "beyond" if distance - down > margin else "within" if distance + up <= margin else "unclear"
        sees = readings.original is not None and readings.original.value - by_construction > margin
        return Comparison(distance, distance - down, distance + up, margin, status, sees)
    if len(references) < 2:
        if never_seen is None:
            return Comparison(None, None, None, None, "unknown")
        down, up = sampling_error(audited, ())
        distance = audited.value - never_seen
        sees = None if readings.original is None else readings.original.value - never_seen > margin
        status = "beyond" if distance - down > margin else "unknown"
        return Comparison(distance, distance - down, distance + up, margin, status, sees)
    values, count = [one.value for one in references], len(references)
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    of_references = float(stats.t.ppf(CONFIDENCE, count - 1)) * spread / math.sqrt(count)
    down, up = (math.hypot(side, of_references) for side in sampling_error(audited, references))
    allowance = allowed(spread, count, checks)
    distance, limit = audited.value - mean, margin + allowance
    original = None if readings.original is None else readings.original.value - mean
    if distance - down > limit:
        status = "beyond"
    elif distance + up > limit:
        status = "unclear"
    elif allowance > margin if original is None else margin + spread * spreads_apart(checks) < original <= limit:
        status = "blind"
    else:
        status = "within"
    return Comparison(
        distance, distance - down, distance + up, limit, status, original is not None and original > limit
    )


def spreads_apart(checks: int) -> float:
    """How many of their standard deviations one more retrained model may lie from the mean of endless others, in all K checks."""
    return float(stats.norm.ppf(1 - (1 - CONFIDENCE) / checks))


def allowed(spread: float, references: int, checks: int) -> float:
    """What is added to a stated margin: see the module."""
    beyond = stats.t.ppf(1 - (1 - CONFIDENCE) / checks, references - 1) * math.sqrt(1 + 1 / references)
    return float(spread * (beyond + stats.t.ppf(CONFIDENCE, references - 1) / math.sqrt(references)))


def sampling_error(audited: Reading, references: Sequence[Reading]) -> tuple[float, float]:
    """How far below and above the distance may lie for other examples of the same kind, each bound at [`CONFIDENCE`].

    Of right or wrong answers Clopper and Pearson's interval, as much narrower or wider as the paired differences vary less or more than the answers;
    of other means Student's t of the differences; of means over pairs DeLong's error of paired areas; of what is no mean the standard errors.
    """
    if audited.per_example is None or len(audited.per_example) < 1:
        errors = [one.error or 0.0 for one in references]
        error = math.hypot(audited.error or 0.0, math.sqrt(sum(e * e for e in errors)) / max(1, len(errors)))
        law = stats.norm if audited.freedom is None else stats.t(audited.freedom)
        return (float(law.ppf(CONFIDENCE) * error),) * 2
    values = np.array(audited.per_example)
    differences, count = _differences(audited, references, "per_example"), len(values)
    if audited.per_other is not None:
        others = _differences(audited, references, "per_other")
        errors = (one.var(ddof=1) / len(one) if len(one) > 1 else math.inf for one in (differences, others))
        return (float(stats.norm.ppf(CONFIDENCE)) * math.sqrt(sum(errors)),) * 2
    of_mean = (
        float(stats.t.ppf(CONFIDENCE, count - 1) * differences.std(ddof=1) / math.sqrt(count))
        if count > 1
        else math.inf
    )
    if not set(np.unique(values)) <= {0.0, 1.0}:
        return of_mean, of_mean
    right = int(values.sum())
    interval = stats.binomtest(right, count).proportion_ci(2 * CONFIDENCE - 1, method="exact")
    exact = float(right / count - interval.low), float(interval.high - right / count)
    if values.std() == 0:  # all right, or all wrong
        return tuple(max(side, of_mean if differences.std() > 0 else 0.0) for side in exact)
    return tuple(float(differences.std() / values.std()) * side for side in exact)


def _differences(audited: Reading, references: Sequence[Reading], name: str) -> np.ndarray:
    """Row by row, of the audited model from the mean of the references that were asked the same rows."""
    values = np.array(getattr(audited, name))
    others = [getattr(one, name) for one in references]
    paired = [one for one in others if one and len(one) == len(values)]
    return values - np.mean(paired, axis=0) if paired else values


def equivalent(one: Reading, other: Reading, margin: float) -> bool:
    """Whether two readings differ by less than a margin, both ways, at [`CONFIDENCE`]."""
    down, up = sampling_error(one, [other])
    distance = one.value - other.value
    return distance - down > -margin and distance + up < margin
