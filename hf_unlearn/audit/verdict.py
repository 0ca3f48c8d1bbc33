r"""How far the audited model is from retrained ones, and the word for it.

Of a check with readings $r_1 … r_R$ of retrained models and $a$ of the audited one, the distance is $D = a - \bar r$. Its interval
joins what the examples leave open (exact where they are right or wrong, else Student's t of the paired differences) and what so few
references leave open ($t_{R-1}\, s/\sqrt R$), each bound by itself (Zou and Donner's MOVER). The margin is what was stated plus what
retrained models differ among each other,

$$ M = m + s \left( t_{R-1, 1-\alpha/K} \sqrt{1 + 1/R} + t_{R-1, 1-\alpha} / \sqrt R \right), $$

so that one more retrained model is within all K margins in 95 audits of 100. *Beyond* is a lower bound above M, *within* an upper bound
up to M. With few references M is wide: a check whose margin hides the original itself is *blind*, which is not passed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy import stats

from .check import Layer, Reading, Readings


if TYPE_CHECKING:
    from .report import CheckResult
    from .residual import ResidualMu


CONFIDENCE = 0.95  # of each bound by itself; the two of an interval hold together in 90 of 100
FEW = 20  # forget examples, below which an audit says that its power is low
Status = Literal["beyond", "within", "blind", "unclear", "unknown"]
Word = Literal["not forgotten", "suppressed", "forgotten", "undetermined"]


@dataclass(frozen=True)
class Comparison:
    """The audited model beside retrained ones (or beside what is known of a class never seen) in one check.

    Args:
        distance, low, high, margin (`float`, *optional*): D with its bounds, and M. None where there is nothing to compare with.
        status (`str`): `"beyond"`, `"within"`, `"blind"`, `"unclear"` or `"unknown"`.
        sees (`bool`, *optional*): whether the original is beyond the margin: whether the check would notice memory. None without it.
    """

    distance: float | None
    low: float | None
    high: float | None
    margin: float | None
    status: Status
    sees: bool | None = None


def compared(readings: Readings, margin: float, checks: int, *, never_seen: float | None = None) -> Comparison:
    """[`Comparison`] of a check's readings.

    Args:
        margin (`float`): the stated one, m.
        checks (`int`): K, of all that take part in the verdict.
        never_seen (`float`, *optional*): value of a model that never saw a forgotten class; used below two references, and then proves
            memory but not its absence.
    """
    references, audited = readings.retrained, readings.audited
    if len(references) < 2:
        if never_seen is None:
            return Comparison(None, None, None, None, "unknown")
        down, up = sampling_error(audited, ())
        distance = audited.value - never_seen
        sees = None if readings.original is None else readings.original.value - never_seen > margin
        status = "beyond" if distance - down > margin else "unknown"
        return Comparison(distance, distance - down, distance + up, margin, status, sees)
    values = np.array([one.value for one in references])
    count, mean, spread = len(values), values.mean(), values.std(ddof=1)
    of_references = stats.t.ppf(CONFIDENCE, count - 1) * spread / math.sqrt(count)
    down, up = (math.hypot(side, of_references) for side in sampling_error(audited, references))
    allowance = allowed(spread, count, checks)
    distance, limit = audited.value - mean, margin + allowance
    original = None if readings.original is None else readings.original.value - mean
    if distance - down > limit:
        status = "beyond"
    elif distance + up > limit:
        status = "unclear"
    elif allowance > margin and (original is None or margin < original <= limit):
        status = "blind"
    else:
        status = "within"
    return Comparison(
        distance, distance - down, distance + up, limit, status, original is not None and original > limit
    )


def allowed(spread: float, references: int, checks: int) -> float:
    """What is added to a stated margin: see the module."""
    beyond = stats.t.ppf(1 - (1 - CONFIDENCE) / checks, references - 1) * math.sqrt(1 + 1 / references)
    return spread * (beyond + stats.t.ppf(CONFIDENCE, references - 1) / math.sqrt(references))


def sampling_error(audited: Reading, references: Sequence[Reading]) -> tuple[float, float]:
    """How far below and above the distance may lie for other examples of the same kind, each bound at [`CONFIDENCE`].

    Of right or wrong answers Clopper and Pearson's interval, narrowed by how much less the paired differences vary than the answers;
    of other means Student's t of the differences; of what is no mean the standard errors.
    """
    if audited.per_example is None or len(audited.per_example) < 1:
        errors = [one.error or 0.0 for one in references]
        error = math.hypot(audited.error or 0.0, math.sqrt(sum(e * e for e in errors)) / max(1, len(errors)))
        return (stats.norm.ppf(CONFIDENCE) * error,) * 2
    values = np.array(audited.per_example)
    paired = [
        one.per_example for one in references if one.per_example is not None and len(one.per_example) == len(values)
    ]
    differences = values - np.mean(paired, axis=0) if paired else values
    count = len(values)
    if set(np.unique(values)) <= {0.0, 1.0}:
        right = int(values.sum())
        interval = stats.binomtest(right, count).proportion_ci(2 * CONFIDENCE - 1, method="exact")
        agreement = min(1.0, differences.std() / values.std()) if values.std() > 0 else 1.0
        return agreement * (right / count - interval.low), agreement * (interval.high - right / count)
    if count < 2:
        return math.inf, math.inf
    return (float(stats.t.ppf(CONFIDENCE, count - 1) * differences.std(ddof=1) / math.sqrt(count)),) * 2


def equivalent(one: Reading, other: Reading, margin: float) -> bool:
    """Whether two readings differ by less than a margin, both ways, at [`CONFIDENCE`]."""
    down, up = sampling_error(one, [other])
    distance = one.value - other.value
    return distance - down > -margin and distance + up < margin


@dataclass(frozen=True)
class Verdict:
    """What an audit found.

    Args:
        word (`str`): `"not forgotten"`, `"suppressed"` (gone from the output, and back below it), `"forgotten"`, or `"undetermined"`.
        decided_by (`str`): name of the check that decided, or `"residual_mu"`; of `"forgotten"` the one that came closest to its margin.
        why (`str`): a sentence with its number.
        needs (`tuple[str, ...]`, defaults to `()`): what would settle it.
    """

    word: Word
    decided_by: str
    why: str
    needs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.word}: {self.why}"


def decide(
    results: Sequence[CheckResult],
    residual: ResidualMu,
    *,
    references: int,
    forget_examples: int,
    failed: dict[str, str],
) -> Verdict:
    """The verdict of all checks: never better than that of the weakest one.

    Args:
        results (`Sequence[CheckResult]`): of the checks that ran.
        residual ([`ResidualMu`]): how well the model is told from retrained ones by the loss of the forget data.
        references (`int`): retrained models.
        forget_examples (`int`): that the checks looked at.
        failed (`dict[str, str]`): checks that did not run, and why.
    """

    def worst(layer: Layer, status: Status) -> CheckResult | None:
        found = [one for one in results if one.layer == layer and one.status == status]
        return max(found, key=_beyond, default=None)

    few = (f"more than {forget_examples} forget examples",) if forget_examples < FEW else ()
    if seen := worst("output", "beyond"):
        return Verdict("not forgotten", seen.name, f"{seen.title}: {seen.in_words()}")
    if same := _as_the_original(results, references):
        return same
    if back := worst("below", "beyond"):
        return Verdict("suppressed", back.name, f"{back.title}: {back.in_words()}")
    if references < 2:
        first = next((one for one in results if one.layer == "output"), None)
        number = f"; {first.title}: {first.in_words()}" if first else ""
        why = f"{'one retrained model is' if references else 'no retrained model is'} there to compare with{number}"
        return Verdict(
            "undetermined", first.name if first else "", why, ("at least 3 retrained models (retrained=)", *few)
        )
    if failed:
        name, error = next(iter(failed.items()))
        return Verdict("undetermined", name, f"{name} did not run ({error})", (f"a run of {name}", *few))
    for status, say, need in (
        ("unclear", "cannot be told from the margin", "more forget examples or more retrained models"),
        (
            "blind",
            "the margin of so few references hides the original too",
            f"more than {references} retrained models",
        ),
    ):
        for layer in ("output", "below"):
            if open_ := worst(layer, status):
                return Verdict("undetermined", open_.name, f"{open_.title}: {open_.in_words()}; {say}", (need, *few))
    if residual.status != "within":
        need = (
            "unlearning that goes no further than retraining"
            if residual.status == "beyond"
            else f"more than {references} retrained models"
        )
        return Verdict("undetermined", "residual_mu", residual.in_words(), (need, *few))
    for status in ("beyond", "unclear", "blind"):
        if far := worst("distance", status):
            need = (
                "unlearning that goes no further than retraining"
                if status == "beyond"
                else f"more than {references} retrained models"
            )
            return Verdict("undetermined", far.name, f"{far.title}: {far.in_words()}; nothing came back", (need, *few))
    if not any(one.sees for one in results if one.layer in ("output", "below")):
        why = "no check tells the original from retrained models, so there is nothing to see the forgetting by"
        return Verdict(
            "undetermined",
            results[0].name if results else "",
            why,
            ("the original (original=), or more forget examples",),
        )
    if few:
        return Verdict("undetermined", "", f"{forget_examples} forget examples are too few to say more", few)
    nearest = max((one for one in results if one.layer in ("output", "below")), key=_beyond)
    return Verdict(
        "forgotten", nearest.name, f"all within their margins, nearest {nearest.title}: {nearest.in_words()}"
    )


def _as_the_original(results: Sequence[CheckResult], references: int) -> Verdict | None:
    """Without references: every output of the audited model is the original's."""
    outputs = [one for one in results if one.layer == "output" and one.original is not None]
    if (
        references >= 2
        or not outputs
        or not all(equivalent(one.readings.audited, one.readings.original, one.stated) for one in outputs)
    ):
        return None
    first = outputs[0]
    return Verdict("not forgotten", first.name, f"{first.title}: {first.in_words()}, as the original")


def _beyond(result: CheckResult) -> float:
    """How far a bound is from the margin, in margins."""
    bound = result.low if result.status == "beyond" else result.high
    return (bound - result.margin) / max(result.margin, 1e-12)
