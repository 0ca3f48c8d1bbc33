"""A generator's own latents as what a filter judges."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_rows(latents: Any, argument: str) -> Tensor:
    """Latents `[n, …]`, a tensor, an array or a list of them, as `[n, d]`.

    Raises:
        ValueError: something else: images, texts, whole numbers, none, or of different shapes.
    """
    try:
        if not isinstance(latents, Tensor):
            parts = latents if isinstance(latents, list | tuple) else None
            if parts and all(isinstance(part, Tensor) for part in parts):
                latents = torch.stack(list(parts))
            else:
                latents = torch.as_tensor(np.asarray(latents))
    except (TypeError, ValueError, RuntimeError):
        found = type(latents).__name__
    else:
        if latents.is_floating_point() and latents.ndim > 1 and len(latents):
            return latents.detach().flatten(1)
        found = f"{str(latents.dtype).removeprefix('torch.')} {list(latents.shape)}"
    raise ValueError(f"{argument}: must be latents, float [n, …], as there is no encoder; got {found}")
