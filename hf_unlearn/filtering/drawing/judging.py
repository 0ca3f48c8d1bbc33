"""What a filter says of images and videos, and that an error does not carry them away: for pipelines of every make."""

from __future__ import annotations

from traceback import clear_frames
from typing import TYPE_CHECKING

import torch
from torch import Tensor


if TYPE_CHECKING:
    from ..checker import FASTSafetyChecker


def judged(inputs: Tensor, checker: FASTSafetyChecker) -> tuple[Tensor, Tensor]:
    """Flags `[n]` and scores `[n, concepts]` of images `[n, channels, height, width]` in [−1, 1], or of latents, on the CPU.

    Raises:
        ValueError: the filter judged another number of them.
    """
    flags, scores = checker.judge(inputs, value_range=(-1, 1))
    if flags.shape != (len(inputs),) or flags.dtype != torch.bool or len(scores) != len(inputs):
        raise ValueError(f"safety_checker: judged {list(flags.shape)} of {len(inputs)} images")
    return flags.cpu().clone(), scores.float().cpu().clone()


def judged_shown(shown: Tensor, finite: Tensor, checker: FASTSafetyChecker) -> tuple[Tensor, Tensor]:
    """Flags and scores of what a pipeline shows; of videos every frame is judged, and each by its worst one.

    Args:
        shown (`Tensor`): images `[n, channels, height, width]` in [0, 1], or videos `[n, frames, channels, height, width]`.
        finite (`Tensor`): bool, `[n]`, on the CPU. What is not finite is not released, whatever an encoder makes of it.
        checker ([`FASTSafetyChecker`]): judges images.
    """
    whole = shown if finite.all() else shown.nan_to_num(0)
    images = (whole.float() * 2).sub_(1)
    if images.ndim == 4:
        flags, scores = judged(images, checker)
    else:
        videos = images.shape[:2]
        flags, scores = judged(images.flatten(0, 1), checker)
        flags, scores = flags.view(videos).any(1), scores.view(*videos, -1).amax(1)  # NaN is above all
    scores[~finite] = torch.nan
    return flags | ~finite, scores


def forget_locals(error: BaseException) -> None:
    """Whoever keeps an error keeps its frames, and in them would be images that the filter has not released."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
