"""Two batches that a denoiser sees in one pass: a small one takes half the calls, and a shared one is gathered half as often."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..objective import Batch


class Together:
    """Answers to several noisy batches, each given out once; all are asked for with the first.

    Args:
        batches: as [`~hf_unlearn.unlearning.diffusion.objective.DenoisingMixin.prepared`] leaves them, all with the same kind of conditioning.
        forwards: denoisers of which it is known that they will be asked about every one of the batches.
    """

    def __init__(self, batches: Sequence[Batch], forwards: Sequence[Callable]):
        self.batches, self.forwards = batches, forwards
        self._answers: list[dict[int, Tensor]] = [{} for _ in forwards]

    def answer(self, ask: Callable[[Callable, Batch], Tensor], forward: Callable, batch: Batch) -> Tensor | None:
        """A denoiser's answer to a batch; None where it is not one of these, or has been given out.

        Args:
            ask (callable): takes a denoiser and a batch; each row of its answer depends on that row alone.
            forward (callable): the denoiser.
            batch: the very one, or a copy with the same images and conditioning.
        """
        place = next((place for place, own in enumerate(self.batches) if _same(own, batch)), None)
        answers = next(
            (had for known, had in zip(self.forwards, self._answers, strict=True) if known == forward), None
        )
        if place is None or answers is None:
            return None
        if not answers:
            sizes = [len(own["noisy"]) for own in self.batches]
            answers |= enumerate(ask(forward, joined(self.batches)).split(sizes))
        found, answers[place] = answers[place], None
        return found


def _same(one: Batch, other: Batch) -> bool:
    return all(one[name] is other[name] for name in ("noisy", "timesteps", "conditioning"))


def joined(batches: Sequence[Batch]) -> Batch:
    """What a denoiser is shown of several batches, as one."""
    shown = {name: torch.cat([batch[name] for batch in batches]) for name in ("noisy", "timesteps")}
    told = {name: torch.cat([batch["conditioning"][name] for batch in batches]) for name in batches[0]["conditioning"]}
    return shown | {"conditioning": told}
