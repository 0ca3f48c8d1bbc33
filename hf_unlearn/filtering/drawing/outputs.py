"""Adds a filter's verdict to what a pipeline gives back."""

from __future__ import annotations

from dataclasses import field, fields, make_dataclass
from functools import cache
from typing import Any

from diffusers.utils import BaseOutput


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
