"""Images as a pipeline gave them, and what a filter says of each."""

from __future__ import annotations

from dataclasses import dataclass, fields

from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class Drawn:
    """What a pipeline drew.

    Args:
        output (`BaseOutput`): as the pipeline gave it.
        images (`Tensor`): its images, `[n, channels, height, width]` in [0, 1], or latents.
        flags (`Tensor`): bool, `[n]`: not to be released.
        scores (`Tensor`): fp32, `[n, concepts]`.
    """

    output: BaseOutput
    images: Tensor
    flags: Tensor
    scores: Tensor

    def take(self, other: Drawn, picks: list[int], places: list[int]) -> None:
        """Put the images at `picks` of another draw to these places."""
        if other.images.shape[1:] != self.images.shape[1:]:
            raise ValueError(f"pipeline: drew {list(other.images.shape[1:])} after {list(self.images.shape[1:])}")
        self.images = self.images.clone()
        self.images[places] = other.images[picks].to(self.images)
        self.flags[places] = other.flags[picks]
        self.scores[places] = other.scores[picks]
        for item in fields(self.output):
            own, new = getattr(self.output, item.name), getattr(other.output, item.name)
            # One entry an image, such as the verdict of Stable Diffusion's own checker.
            if item.name != "images" and isinstance(own, list) and len(own) == len(self.flags):
                merged = dict(zip(places, (new[pick] for pick in picks), strict=True))
                setattr(self.output, item.name, [merged.get(place, value) for place, value in enumerate(own)])
