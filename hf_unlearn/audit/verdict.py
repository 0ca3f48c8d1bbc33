"""The word for what an audit found: never better than the weakest check, and with the number that decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .check import Layer
from .equivalence import Status, equivalent
from .residual import ResidualMu
from .result import CheckResult


FEW = 20  # forget examples, below which an audit says that its power is low
Word = Literal["not forgotten", "suppressed", "forgotten", "undetermined"]


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
    failed: Mapping[str, str],
    left_out: Sequence[str] = (),
) -> Verdict:
    """The verdict of all checks: never better than that of the weakest one.

    Args:
        results (`Sequence[CheckResult]`): of the checks that ran.
        residual ([`ResidualMu`]): how well the model is told from retrained ones by the loss of the forget data.
        references (`int`): retrained models.
        forget_examples (`int`): that the checks looked at.
        failed (`dict[str, str]`): checks that decide and did not run, and why.
        left_out (`Sequence[str]`, defaults to `()`): checks without which nothing is called forgotten, and that were not asked for.
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
    if residual.knows:
        why = f"{residual.in_words()}: the data are far likelier to it than to models that never saw them"
        return Verdict("suppressed", "residual_mu", why)
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
    more = f"more than {references} retrained models"
    for status, say, need in (
        ("unclear", "cannot be told from the margin", f"more forget examples, or {more}"),
        ("blind", "the margin of so few references hides the original too", more),
    ):
        for layer in ("output", "below"):
            if open_ := worst(layer, status):
                return Verdict(
                    "undetermined",
                    open_.name,
                    f"{open_.title}: {open_.in_words()}; {say}",
                    (open_.settle or need, *few),
                )
    further = "unlearning that goes as far as retraining and no further"
    if residual.status != "within":
        of_loss = "forget data of which such a model gives a loss"
        need = of_loss if residual.loss is None else further if residual.status == "beyond" else more
        return Verdict("undetermined", "residual_mu", f"{residual.in_words()}; nothing came back", (need, *few))
    for status, need in (("beyond", further), ("unclear", more), ("blind", more)):
        if far := worst("distance", status):
            need = need if status == "beyond" else far.settle or need
            return Verdict("undetermined", far.name, f"{far.title}: {far.in_words()}; nothing came back", (need, *few))
    if left_out:
        why = f"{', '.join(left_out)} {'was' if len(left_out) == 1 else 'were'} not asked for"
        return Verdict("undetermined", left_out[0], why, ("checks='quick' or 'standard'", *few))
    if not all(any(one.sees for one in results if one.layer == layer) for layer in ("output", "below")):
        why = "no check of what is said, or none of what comes back, tells the original from retrained models: there is nothing to see the forgetting by"
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
