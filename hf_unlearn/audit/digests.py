"""Which weights and which rows an audit is of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def digest_of(model: nn.Module) -> str:
    """Of all parameters and buffers that are saved, by name, whatever device they are on: 32 hexadecimal digits."""
    return digest_of_tensors(sorted(model.state_dict().items()))


def digest_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in tensors:
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
