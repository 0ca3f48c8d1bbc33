"""Adds a filter's verdict to what a pipeline gives back."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from typing import Any

from diffusers.utils import BaseOutput
from torch import Tensor


VERDICT = {"filtered": "list[bool]", "filter_scores": "Tensor", "filter_tries": "list[int]"}


def with_verdict(output: BaseOutput, **values: Any) -> BaseOutput:
    """`output` with some fields set to other values and those of [`VERDICT`] added; of a subclass of its class."""
    return _restore(type(output), {item.name: getattr(output, item.name) for item in fields(output)} | values)


def as_tuple(output: BaseOutput) -> tuple:
    """All fields, as `return_dict=False` gives them: `BaseOutput.to_tuple` of diffusers 0.42 drops those that are None."""
    return tuple(getattr(output, item.name) for item in fields(output))


def _restore(kind: type, values: dict[str, Any]) -> BaseOutput:
    return _extended(kind)(**values)


@cache
def _extended(kind: type) -> type:
    # A class made while running cannot be found by pickle, but its base can, and that says it all.
    def reduce(self):
        return _restore, (kind, {item.name: getattr(self, item.name) for item in fields(self)})

    added = [(name, annotation, field(default=None)) for name, annotation in VERDICT.items()]
    namespace = {"__reduce__": reduce, "__module__": __name__, "__doc__": f"{kind.__name__}, and what a filter said."}
    return make_dataclass(f"Filtered{kind.__name__}", added, bases=(kind,), namespace=namespace)


@dataclass
class Drawn:
    """What a pipeline drew.

    Args:
        output (`BaseOutput`): as the pipeline gave it.
        images (`Tensor`): its images, `[n, channels, height, width]` in [0, 1], videos, `[n, frames, channels, height, width]`, or
            latents.
        flags (`Tensor`): bool, `[n]`: not to be released.
        scores (`Tensor`): fp32, `[n, concepts]`.
        content (`str`): the field of the output that they come from.
    """

    output: BaseOutput
    images: Tensor
    flags: Tensor
    scores: Tensor
    content: str = "images"

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
            if item.name != self.content and isinstance(own, list) and len(own) == len(self.flags):
                merged = dict(zip(places, (new[pick] for pick in picks), strict=True))
                setattr(self.output, item.name, [merged.get(place, value) for place, value in enumerate(own)])
