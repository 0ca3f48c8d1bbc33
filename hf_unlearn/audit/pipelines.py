"""Pipelines by their folder or id, also of this package's own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..files import loading


def load_pipeline(name: str | Path, argument: str, dtype: torch.dtype) -> Any:
    """A pipeline of diffusers, or of a class that `hf_unlearn` exports and diffusers does not know: GANs, and pipelines with a filter.

    Args:
        name (`str`): a folder, or an id on the Hub.
        argument (`str`): what to call it in an error.
        dtype (`torch.dtype`): of its weights.

    Raises:
        ValueError: there is none.
    """
    from diffusers import DiffusionPipeline

    import hf_unlearn

    with loading(argument, str(name), "a pipeline"):
        kind = getattr(hf_unlearn, str(DiffusionPipeline.load_config(str(name))["_class_name"]), DiffusionPipeline)
        return kind.from_pretrained(str(name), **({} if dtype == torch.float32 else {"torch_dtype": dtype}))
