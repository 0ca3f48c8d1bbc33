"""What anyone sees who asks a generator: how often it draws the forgotten kind, unprompted, asked as ever, or asked in other words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...metrics.generation import percentage_unlearned
from ..check import Check, Reading, Readings, Role
from .data import Asked, GeneratorData
from .prompts import paraphrased, reordered
from .subject import GeneratorSubject, marks


class OfDraws(Check):
    """A check whose value is the share of draws that show the forgotten kind: the same noise for every model."""

    prompted: bool | None = None  # whether it is one of generators that take prompts, or of those that take none
    needs: tuple[str, ...] = ()  # of what the audited pipeline may lack
    of_stranger = False  # whether who never saw the kind draws it no more often than the marker errs

    def missing(self, data: GeneratorData, roles: Sequence[Role]) -> str | None:
        if self.prompted is not None and bool(data.forget_prompts) != self.prompted:
            return "the generator takes no prompts" if self.prompted else "the generator draws by prompts"
        return next((data.lacks[name] for name in self.needs if name in data.lacks), None)

    def never_seen(self, data: GeneratorData) -> float | None:
        # Of noise that the original makes the kind of, others make what resembles it: there the marker errs more.
        unlike = self.layer == "output" or not data.from_original
        return data.false_alarms if self.of_stranger and unlike else None

    def settled(self, readings: Readings, data: GeneratorData) -> Readings:
        """With the percentage unlearned of every model, by the draws in which the original shows the kind."""
        original = readings.original
        if original is None or not original.value or not set(original.per_example) <= {0.0, 1.0}:
            return readings
        before = [round(value) for value in original.per_example]

        def with_pul(one: Reading) -> Reading:
            result = percentage_unlearned(before, [round(value) for value in one.per_example], 1)
            return replace(
                one, figures=dict(one.figures) | {"pul": result.pul, "pul_interval": [result.low, result.high]}
            )

        return readings.map(with_pul)


class Drawn(OfDraws):
    name, title, margin, layer, paper = "drawn", "Forgotten kind among unprompted draws", 0.02, "output", "2309.14054"
    of_stranger = True
    what = (
        "Whether the generator still shows it when nobody asks. The percentage unlearned (PUL) stands beside, for the retrained models too: a marker "
        "errs, so theirs is not 100."
    )

    def read(self, subject: GeneratorSubject, data: GeneratorData, seed: int) -> Reading:
        look = subject.look(data.unprompted, data.marker, data.drawing)
        return Reading.mean_of(
            look.kind, classes=None if look.classes is None else torch.bincount(look.classes).tolist()
        )


class AskedFor(OfDraws):
    name, title, margin, layer, paper = (
        "asked",
        "Forgotten kind where the original draws it",
        0.05,
        "output",
        "2309.14054",
    )
    what = "Whether the prompts that were to lose their meaning, or the noise of which the original makes the kind, still give it."

    def missing(self, data: GeneratorData, roles: Sequence[Role]) -> str | None:
        there = data.forget_prompts or data.from_original
        return super().missing(data, roles) if there else "there is no original that draws the kind"

    def read(self, subject: GeneratorSubject, data: GeneratorData, seed: int) -> Reading:
        return Reading.mean_of(subject.look(data.asked, data.marker, data.drawing).kind)


class OtherWords(OfDraws):
    """Asked for in other words, the same noise."""

    margin, layer, prompted, of_stranger = 0.05, "output", True, True
    wording: Callable[[str, int], str | None]

    def cost(self, data: GeneratorData) -> tuple[float, float]:
        return len(data.asked), 0

    def missing(self, data: GeneratorData, roles: Sequence[Role]) -> str | None:
        if (why := super().missing(data, roles)) is None and self.said(data) is None:
            return "no prompt has parts to put in another order"
        return why

    def said(self, data: GeneratorData) -> Asked | None:
        prompts = [type(self).wording(prompt, number) for number, prompt in enumerate(data.asked.prompts or ())]
        rows = [row for row, prompt in enumerate(prompts) if prompt is not None]
        return (
            Asked(tuple(data.asked.seeds[row] for row in rows), tuple(prompts[row] for row in rows)) if rows else None
        )

    def read(self, subject: GeneratorSubject, data: GeneratorData, seed: int) -> Reading:
        said = self.said(data)
        return Reading.mean_of(marks(subject.pipe, said, data), first=said.prompts[0])


class Paraphrased(OtherWords):
    name, title = "paraphrased", "Asked for in other words"
    wording = staticmethod(paraphrased)
    what = "Whether a prompt that says the same in another frame gives the kind: what was tied to one wording only comes back."


class Reordered(OtherWords):
    name, title = "reordered", "Asked for in another order"
    wording = staticmethod(reordered)
    what = "Whether the same words in another order give the kind."


def best_of(by_setting: dict[str, Tensor], **figures) -> Reading:
    """The setting with the most draws of the kind, and the share at each."""
    best = max(by_setting.values(), key=lambda kind: float(kind.double().mean()))
    shares = {name: float(kind.double().mean()) for name, kind in by_setting.items()}
    return Reading.mean_of(best, by_setting=shares, **figures)
