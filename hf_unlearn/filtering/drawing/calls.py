"""One call of a pipeline, and the same call again for some of its images."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from torch import Tensor


# How the names of arguments begin in diffusers 0.42 of which every prompt may have its own.
_PICTURES = ("image", "mask", "control_image")
_OF_A_PROMPT = (
    "prompt",
    "negative_prompt",
    "negative_image",
    "pooled_",
    "negative_pooled_",
    "class_labels",
    *_PICTURES,
)
# These may be per prompt too, in a form that each pipeline has of its own.
_UNCLEAR = ("ip_adapter_image", "ip_adapter_image_embeds", "negative_ip_adapter_image_embeds")
_PER_PROMPT = "num_images_per_prompt"
# GANPipeline has both: its batch_size says how many are drawn at a time.
_NUMBERS = ("num_images", "batch_size")


class Call:
    """A call of `pipeline` with the arguments that its `__call__` takes.

    Raises:
        TypeError: arguments that it does not take, as the call itself would raise it.
    """

    def __init__(self, pipeline: DiffusionPipeline, args: Sequence[Any], kwargs: Mapping[str, Any]):
        self.pipeline = pipeline
        self.signature = inspect.signature(pipeline.__call__)
        self.arguments = self.signature.bind(*args, **kwargs).arguments

    def __call__(self) -> Any:
        bound = inspect.BoundArguments(self.signature, self.arguments)
        return self.pipeline(*bound.args, **bound.kwargs)

    def __getitem__(self, name: str) -> Any:
        """An argument or its default; None where there is no such argument."""
        parameter = self.signature.parameters.get(name)
        return None if parameter is None else self.arguments.get(name, parameter.default)

    def takes(self, name: str) -> bool:
        return name in self.signature.parameters

    def replace(self, **values: Any) -> Call:
        """The same call with some arguments changed, of those that there are."""
        call = copy.copy(self)
        known = {name: value for name, value in values.items() if self.takes(name)}
        call.arguments = {**self.arguments, **known}
        return call

    def again(self) -> Call:
        """The same call with new noise: a generator goes on where it is, the caller's latents are left out."""
        call = copy.copy(self)
        call.arguments = {name: value for name, value in self.arguments.items() if name != "latents"}
        return call

    def generator_of(self, places: Sequence[int], drawn: int) -> Any:
        """The generator, or of a list those of these places among the `drawn` ones."""
        generator = self["generator"]
        if isinstance(generator, list) and len(generator) == drawn:
            return [generator[place] for place in places]
        return generator

    def for_places(self, places: Sequence[int], drawn: int) -> Call | None:
        """A call that draws new images for these places among the `drawn` ones, in this order.

        Returns:
            [`Call`]; None if nobody can tell which arguments belong to which image.
        """
        values = {"generator": self.generator_of(places, drawn)}
        number = next((name for name in _NUMBERS if self.takes(name)), None)
        if number is not None:
            return self.again().replace(**values, **{number: len(places)})
        each = self[_PER_PROMPT] or 1
        prompts, rest = divmod(drawn, each)
        if rest:
            return None
        if prompts == 1:
            return self.again().replace(**values, **{_PER_PROMPT: len(places)})
        if any(self[name] is not None for name in _UNCLEAR) or hasattr(
            getattr(self.pipeline, "controlnet", None), "nets"
        ):
            return None
        chosen = [place // each for place in places]
        for name, value in self.arguments.items():
            if not name.startswith(_OF_A_PROMPT) or not isinstance(value, list | tuple | Tensor | np.ndarray):
                continue
            tiled = (
                name.startswith(_PICTURES) and len(value) == prompts and each > 1
            )  # not in the order of the prompts
            if (
                tiled
                or len(value) not in (1, prompts)
                or (name.startswith(_PICTURES) and getattr(value, "ndim", 4) < 4)
            ):
                return None
            if len(value) == prompts:
                values[name] = [value[i] for i in chosen] if isinstance(value, list | tuple) else value[chosen]
        return self.again().replace(**values, **{_PER_PROMPT: 1})
