"""Before and after, from the same noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..filtering.drawing.actions import replaced
from ..filtering.drawing.pipeline import FilteredPipeline
from ..filtering.fitting.rates import Rate
from ..jobs.filter.source import RUN, Source


if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import DiffusionPipeline

    from ..filtering.checker import FASTSafetyChecker
    from ..jobs.recipe.filter import PipelineJob

MOST = 96  # samples of a comparison
SHOWN_ACTIONS = ("blank", "blur", "regenerate")


@dataclass(frozen=True)
class Comparison:
    """The same samples twice.

    Args:
        before, after (`Tensor`): `[n, channels, height, width]` in [0, 1].
        blocked (`list[bool]`, *optional*): which the filter does not release as drawn; None without a filter.
        redrawn (`int`): of the blocked ones, how many other noise was found for that is released.
        prompts (`list[str]`): of each; empty where there are none.
    """

    before: Tensor
    after: Tensor
    blocked: list[bool] | None = None
    redrawn: int = 0
    prompts: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """What happened, in a sentence."""
        n = len(self.before)
        if self.blocked is None:
            moved = (self.before - self.after).abs().flatten(1).mean(1)
            same = int((moved < 0.5 / 255).sum())
            return f"{n} samples, each twice from the same noise; {same} of them look the same after."
        rate = Rate.counted(sum(self.blocked), n)
        text = (
            f"{rate.count} of {n} samples are blocked: {100 * rate.value:.0f} % "
            f"(95 % interval: {100 * rate.low:.0f} to {100 * rate.high:.0f} %)."
        )
        return f"{text} {self.redrawn} of them were drawn again until they were released." if self.redrawn else text


def compared(
    job: PipelineJob,
    pipeline: DiffusionPipeline,
    *,
    checker: FASTSafetyChecker | None = None,
    unlearned: DiffusionPipeline | None = None,
    count: int = 24,
    action: str = "blank",
    told: Callable[[int, int], None] = lambda done, of: None,
) -> Comparison:
    """Draw with a pipeline, and with its filter or what it became.

    Args:
        job ([`PipelineJob`]): prompts, seed, steps, guidance, batch size.
        pipeline ([`~diffusers.DiffusionPipeline`]): draws "before".
        checker, unlearned: one of both: the filter, or what draws "after".
        count (`int`, defaults to 24): samples, 1 to 96.
        action (`"blank"` | `"blur"` | `"regenerate"`): what is shown in place of what is blocked.
        told (callable, *optional*): hears how many are drawn, of how many.

    Raises:
        ValueError: another number or action, or a key that the pipeline does not take.
    """
    if not 1 <= count <= MOST:
        raise ValueError(f"samples: {count} are asked for, 1 to {MOST} can be shown")
    if action not in SHOWN_ACTIONS:
        raise ValueError(f"action={action!r}: must be one of {', '.join(SHOWN_ACTIONS)}")
    before, after, blocked, redrawn = [], [], [], 0
    source = Source(pipeline, job)
    other = None if unlearned is None else Source(unlearned, job)
    pipe = None if checker is None else FilteredPipeline(pipeline, checker)
    for first in range(0, count, job.batch_size):
        numbers = range(first, min(first + job.batch_size, count))
        if other is not None:
            before.append(source.draw(RUN, numbers).images / 2 + 0.5)
            after.append(other.draw(RUN, numbers).images / 2 + 0.5)
        else:
            drawn = pipe(**source.arguments(RUN, numbers), filter_action="flag", output_type="np")
            images, flags = _tensor(drawn.images), torch.tensor(drawn.filtered)
            shown = images.clone()
            if action == "regenerate" and flags.any():
                again = pipe(**source.arguments(RUN, numbers), filter_action="regenerate", output_type="np")
                shown = _tensor(again.images)
                redrawn += int((flags & ~torch.tensor(again.filtered)).sum())
            elif flags.any():
                shown[flags] = replaced(images[flags], drawn.filter_scores[flags], action)
            before.append(images)
            after.append(shown)
            blocked += flags.tolist()
        told(numbers.stop, count)
    prompts = tuple(job.prompts[number % len(job.prompts)] for number in range(count)) if job.prompts else ()
    return Comparison(torch.cat(before), torch.cat(after), blocked if pipe else None, redrawn, prompts)


def _tensor(images) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)
