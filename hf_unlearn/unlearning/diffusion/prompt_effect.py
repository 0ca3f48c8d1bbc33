"""How much of a prompt's effect is left: a figure for a concept of a text-to-image pipeline that needs no classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...modes import looking, seeded_generator
from .pipelines import text_side_of
from .text_side import TextSide, quiet


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


SHARES = (0.95, 0.75, 0.5)  # of the way to noise; what is drawn is decided early
BATCH = 4
LASTING = 0.5  # of a prompt's effect without guidance: half of it is still drawn
UNKNOWN = 0.01  # of the squared effect of a wording: what makes less of a difference is not followed


@dataclass(frozen=True)
class PromptEffect:
    r"""The effect of wordings that name a concept over the same with an anchor, $\Delta = \epsilon(x_t, p) - \epsilon(x_t, a(p))$, of a
    pipeline as it is now; and later, how much of it is left:

    $$ s\,\frac{\langle \Delta', \Delta \rangle}{\lVert \Delta \rVert^2}, $$

    s the guidance scale that the pipeline draws with by default (guidance multiplies what is left). It is s before anything is changed and
    0 where the concept is asked for in vain. Above about 0.5 it is probably still drawn.

    ```python
    effect = PromptEffect.of(pipe, [("a photo of three", "a photo of seven")])
    redirect_concept(pipe, "three", anchor="seven")
    effect.remaining(pipe)
    ```

    Attributes:
        pairs (`list[tuple[str, str]]`): a wording with the concept, and the same with the anchor.
        before (`Tensor`): Δ of the pipeline before, `[pairs, …]`, fp32, on the CPU.
        whole (`Tensor`): squared norm of ε(a(p)) − ε(∅), `[pairs]`: the effect that the other wording has.
        guidance (`float`): s; 1 where the pipeline has no classifier-free guidance.
    """

    pairs: list[tuple[str, str]]
    before: Tensor
    whole: Tensor
    guidance: float

    @classmethod
    def of(cls, pipe: DiffusionPipeline, pairs: Sequence[tuple[str, str]]) -> PromptEffect:
        """Measure a pipeline that has not been changed yet: three answers of the denoiser for each pair, to one noise.

        Args:
            pipe (`DiffusionPipeline`): see [`redirect_concept`].
            pairs (`Sequence[tuple[str, str]]`): a wording with the concept, and the same with the anchor.

        Raises:
            ValueError: there are no pairs, or the pipeline is not supported.
        """
        return measured(text_side_of(pipe), list(pairs))

    def remaining(self, pipe: DiffusionPipeline) -> float:
        """What is left of the effect, times the guidance scale: the mean over all pairs.

        Args:
            pipe (`DiffusionPipeline`): the same one, after it was changed.
        """
        side = text_side_of(pipe)
        now = _differences(side, self.pairs)
        whole = self.before.square().sum().item()
        return self.guidance * (now * self.before).sum().item() / whole if whole else 0.0

    @property
    def unknown(self) -> list[tuple[str, str]]:
        """Pairs that the pipeline answers alike: it does not know the concept, or as the same as the anchor."""
        own = self.before.flatten(1).square().sum(1)
        return [
            pair for pair, is_small in zip(self.pairs, (own <= UNKNOWN * self.whole).tolist(), strict=True) if is_small
        ]


def still_drawn(effect: float, whose: str) -> str | None:
    """What a card says of an effect that lasts; None of one that does not.

    Args:
        effect (`float`): what is left, times guidance.
        whose (`str`): as in `"prompts"`.
    """
    if effect <= LASTING:
        return None
    return (
        f"What was to be forgotten is probably still drawn: its {whose} still have {effect:.2g} times the effect on an answer that they had "
        "without guidance"
    )


def measured(side: TextSide, pairs: Sequence[tuple[str, str]]) -> PromptEffect:
    """[`PromptEffect.of`], of a text side."""
    if not pairs:
        raise ValueError("pairs: there are none; give a wording with the concept and the same with another")
    whole = _differences(side, [(other, "") for _, other in pairs]).flatten(1).square().sum(1)
    return PromptEffect(list(pairs), _differences(side, pairs), whole, side.free_guidance())


@quiet()
def _differences(side: TextSide, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """ε(first) − ε(second) for each pair, on noise that depends on its place alone."""
    noise = torch.cat([side.noise(1, seeded_generator("cpu", place)) for place in range(len(pairs))])
    found: list[Tensor] = []
    with looking(side.denoiser):
        for number, share in enumerate(SHARES):
            places = list(range(number, len(pairs), len(SHARES)))
            for begin in range(0, len(places), BATCH):
                part = places[begin : begin + BATCH]
                noisy = noise[part].to(side.device, side.denoiser.dtype)
                first, second = (
                    side.answer(noisy, share, side.told([pairs[place][which] for place in part])).float().cpu()
                    for which in (0, 1)
                )
                found += zip(part, first - second, strict=True)
    return torch.stack([difference for _, difference in sorted(found, key=lambda one: one[0])])
