"""What happens to images that a filter does not release."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor


ActionName = Literal["blank", "blur", "flag", "regenerate", "raise"]
Action = ActionName | Callable[[Tensor, Tensor], Tensor]
ACTIONS: tuple[str, ...] = get_args(ActionName)


class FilteredImageError(RuntimeError):
    """An image was not released, and the action is `"raise"`.

    Attributes:
        flags (`Tensor`): bool, `[n]`: which images were not released.
        scores (`Tensor`): fp32, `[n, concepts]`.
    """

    def __init__(self, flags: Tensor, scores: Tensor):
        super().__init__(f"{int(flags.sum())} of {len(flags)} images are not released by the filter")
        self.flags = flags
        self.scores = scores

    def __reduce__(self):
        return type(self), (self.flags, self.scores)


def check_action(action: Action, name: str = "action") -> Action:
    """`action`, or a `ValueError` that says which ones there are."""
    if not callable(action) and action not in ACTIONS:
        allowed = ", ".join(map(repr, ACTIONS))
        raise ValueError(f"{name}={action!r}: must be {allowed} or a function of images and scores")
    return action


def blank(images: Tensor) -> Tensor:
    """Black images of the same shape."""
    return torch.zeros_like(images)


def blur(images: Tensor) -> Tensor:
    """Images under a Gaussian with σ = max(height, width) / 8, each channel on its own; its mean stays.

    Beyond its borders an image is mirrored. Eight stripes across the longer side are lost.

    Args:
        images (`Tensor`): `[n, channels, height, width]` in [0, 1].

    Returns:
        `Tensor`: the same shape and dtype, in [0, 1].
    """
    sigma = max(images.shape[-2:]) / 8
    blurred = gaussian_filter(images.float().cpu().numpy(), sigma, axes=(-2, -1), mode="reflect", truncate=6)
    return torch.from_numpy(blurred).clamp(0, 1).to(images)


def replaced(images: Tensor, scores: Tensor, action: Action) -> Tensor:
    """What is shown in place of images that are not released.

    Args:
        images (`Tensor`): `[k, channels, height, width]` in [0, 1], only those that are not released.
        scores (`Tensor`): `[k, concepts]`.
        action (`"blank"`, `"blur"` or a function): what to do with them.

    Returns:
        `Tensor`: the same shape and dtype.

    Raises:
        ValueError: a function gave something else than finite images of the same shape in [0, 1].
    """
    if action == "blank":
        return blank(images)
    whole = images.nan_to_num(0, 0, 0)
    if action == "blur":
        return blur(whole)
    given = action(whole.float(), scores)
    if not isinstance(given, Tensor) or given.shape != images.shape or not given.is_floating_point():
        found = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"action: gave {found}, must give floating-point images of shape {list(images.shape)}")
    if not ((given >= 0) & (given <= 1)).all():
        raise ValueError("action: gave images that are not finite or not in [0, 1]")
    return given.to(images)
