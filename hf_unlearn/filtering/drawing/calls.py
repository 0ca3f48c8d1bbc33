"""One call of a pipeline, and the same call again for some of its images."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline


# How diffusers 0.42 calls the number of images that a call draws, and that of each prompt. GANPipeline has both of the first: its
# batch_size says how many are drawn at a time.
_NUMBERS = ("num_images", "batch_size")
_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt")
_PROMPTS = ("prompt", "negative_prompt")
# Which are told apart, or left out, themselves.
_OF_THE_CALL = ("generator", "latents", "output_type", "return_dict")


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

    def _values_of(self, name: str) -> list[Any]:
        value = self.arguments[name]
        return (
            list(value.values()) if self.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else [value]
        )

    @property
    def _number(self) -> str | None:
        return next((name for name in _NUMBERS if self.takes(name)), None)

    def replace(self, **values: Any) -> Call:
        """The same call with some arguments changed, of those that there are."""
        call = copy.copy(self)
        known = {name: value for name, value in values.items() if self.takes(name)}
        call.arguments = {**self.arguments, **known}
        return call

    def again(self) -> Call:
        """The same call with new noise: a generator goes on where it is, the caller's latents are left out, of which there may be
        more than the call says.
        """
        call, latents = copy.copy(self), self["latents"]
        if latents is not None and self._number:
            call = self.replace(**{self._number: len(latents)})
        given = self.signature.parameters.get("latents")
        if given is not None and given.default is not inspect.Parameter.empty:
            call.arguments = {name: value for name, value in call.arguments.items() if name != "latents"}
        return call

    def generator_of(self, places: Sequence[int], drawn: int) -> Any:
        """The generator, or of a list those of these places among the `drawn` ones."""
        generator = self["generator"]
        if isinstance(generator, list) and len(generator) == drawn:
            return [generator[place] for place in places]
        return generator

    def for_places(self, places: Sequence[int], drawn: int) -> Call | None:
        """A call that draws new images for these places among the `drawn` ones, in this order.

        Only where every argument that was given is understood: one value (a number, a word, a function), which holds for all
        images; how many to draw; or a list of prompts, of which each has as many images one after another. What another list, a
        tensor or a picture means, its name and its length do not tell.

        Returns:
            [`Call`]; None if an argument is not understood: then the whole call has to be drawn again.
        """
        generator = self["generator"]
        if isinstance(generator, list) and len(generator) != drawn:
            return None
        values: dict[str, Any] = {"generator": self.generator_of(places, drawn)}
        lists = {}
        for name, value in self.arguments.items():
            if name in _PROMPTS and isinstance(value, list) and all(isinstance(text, str) for text in value):
                lists[name] = value
            elif name not in _OF_THE_CALL and not all(map(_is_one_value, self._values_of(name))):
                return None
        number, again = self._number, self.again()
        each = next((name for name in _PER_PROMPT if self.takes(name)), None)
        if number is not None and each is None and not lists and again[number] == drawn:
            return again.replace(**values, **{number: len(places)})
        if each is None or number is not None or "prompt" not in self.arguments:
            return None
        images = self[each] or 1
        if "prompt" not in lists:
            if lists or not isinstance(self["prompt"], str) or images != drawn:
                return None
            return again.replace(**values, **{each: len(places)})
        if {len(prompts) for prompts in lists.values()} != {drawn / images}:
            return None
        chosen = {name: [prompts[place // images] for place in places] for name, prompts in lists.items()}
        return again.replace(**values, **chosen, **{each: 1})


def _is_one_value(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str) or callable(value)
