"""What became of what a GAN was to forget: how often it is drawn, before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...hub.card import Figure
from ...metrics.features import features_of
from .feedback import FEWEST, Feedback, spread_marks


JUDGED, JUDGE_SEED = 1_000, 15  # samples, always from the same latents


@dataclass(frozen=True)
class Drawn:
    """Share of the samples that show what was to be forgotten, in [0, 1], of the original and of the unlearned generator."""

    before: float
    after: float


class Judged(nn.Module):
    """Features of images, as a discriminator sees them."""

    name = "discriminator"

    def __init__(self, discriminator: nn.Module):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, images: Tensor) -> Tensor:
        return self.discriminator(images.to(self.discriminator.dtype)).features.float()


class GANOutcomeMixin:
    """Judges a run at its end, by the `marker` where there is one, else by what the marks say of samples."""

    feedback: Feedback
    marker: Callable[[Tensor], Tensor] | None
    sorted_by: Callable[[Tensor], Tensor] | None  # what marks are spread by; None: pixels
    outcome: Drawn | None = None

    def judge(self) -> Drawn | None:
        """Of samples from the same latents; None where the marks are too few to say it, or what is drawn is not finite."""
        with self.as_original():
            before = self.draw(JUDGED, JUDGE_SEED)
        samples = torch.cat([before, self.draw(JUDGED, JUDGE_SEED)])
        if not torch.isfinite(samples).all():
            return None
        if self.marker is not None:
            shows = torch.as_tensor(self.marker(samples)).cpu()
        else:
            marked = self.feedback.undesired, self.feedback.clean
            if min(map(len, marked)) < FEWEST:
                return None
            known = [self.mark_features(images).flatten(1).numpy() for images in (*marked, samples)]
            spread = spread_marks(*known, miss_rate=self.args.miss_rate, seed=self.args.seed)
            shows = torch.from_numpy(spread.negative)
        return Drawn(*shows.view(2, JUDGED).double().mean(1).tolist())

    def mark_features(self, images: Tensor) -> Tensor:
        """What the marks are spread by."""
        return (
            images
            if self.sorted_by is None
            else features_of(images, self.sorted_by, name="marks", value_range=(-1, 1)).values
        )

    @property
    def outcome_line(self) -> str:
        """In one sentence: how much is left of what was to be forgotten."""
        said = "how much is left of what was to be forgotten is not known, the marks are too few to tell"
        if self.outcome is not None:
            said = f"{100 * self.outcome.after:.1f} % of the samples show what was to be forgotten ({100 * self.outcome.before:.1f} % before)"
        kept = f"kept is step {self._steps_taken:,}" if self.guard else "quality was not looked at (guard=False)"
        return f"{type(self).__name__}, {self.state.global_step:,} steps: {said}; {kept}"

    @property
    def outcome_figures(self) -> list[Figure]:
        """What was measured when the run ended, for the card."""
        if self.outcome is None:
            return []
        share = {"before": 100 * self.outcome.before, "after": 100 * self.outcome.after}
        return [Figure(metric="undesired", name="Samples that show what was forgotten", split="samples", **share)]

    @property
    def still_drawn(self) -> str | None:
        """What to say where what was to be forgotten is drawn more than half as often as before."""
        drawn = self.outcome
        if drawn is None or drawn.after <= drawn.before / 2:
            return None
        return f"What was to be forgotten is still drawn: {100 * drawn.after:.1f} % of the samples show it, {100 * drawn.before:.1f} % before."
