"""Which weights and which rows an audit is of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def digest_of(model: Any) -> str:
    """Of all parameters and buffers that are saved, by name, whatever device they are on: 32 hexadecimal digits. Of a pipeline also its class and
    settings, by which one of the same weights may draw something else.

    Args:
        model (`nn.Module` | `DiffusionPipeline`): what is audited.
    """
    if isinstance(model, nn.Module):
        return digest_of_tensors(sorted(model.state_dict().items()))
    parts = {name: part for name, part in model.components.items() if isinstance(part, nn.Module)}
    tensors = [(f"{name}.{key}", value) for name, part in parts.items() for key, value in part.state_dict().items()]
    settings = {name: value for name, value in vars(model).items() if isinstance(value, str | int | float | bool)}
    schedule = getattr(getattr(model, "scheduler", None), "config", {})
    text = json.dumps([type(model).__qualname__, *(_public(one) for one in (settings, schedule))], default=str)
    return digest_of_tensors([*sorted(tensors), (text, torch.zeros(0))])


def digest_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in tensors:
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _public(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sorted(values.items()) if not name.startswith("_")}
