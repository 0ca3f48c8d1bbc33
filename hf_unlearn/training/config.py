"""Settings that several families of trainers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


GUARD_RANGES = {"≥ 1": ("guard_steps", "guard_examples")}
IMAGE_RANGES = {"≥ 1": ("batch_size",)}
DRAWING_RANGES = {"≥ 0": ("grid_images",), "≥ 1": ("batch_size", "grid_steps")}


def settle(args: Any) -> None:
    """Defaults of transformers and TRL that would be refused or warned of. Without an accelerator: no pinned memory, and fp32 where
    `bf16` is not given (None). `gradient_checkpointing`: by the name that transformers 5.23 has for it.

    Raises:
        ValueError: `report_to` names no tracker, which transformers would say once the model is loaded.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    asked = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    if odd := [name for name in asked if name not in ("all", "none", *INTEGRATION_TO_CALLBACK)]:
        raise ValueError(f"report_to={odd[0]!r}: must be all, none, or some of {', '.join(INTEGRATION_TO_CALLBACK)}")
    if not torch.accelerator.is_available():
        args.dataloader_pin_memory = False  # torch warns of it, and does not pin
        if args.bf16 is None:
            args.bf16 = False
    if args.activation_checkpointing is None:
        args.activation_checkpointing = args.gradient_checkpointing


@dataclass
class GuardArguments:
    """Whether and when a trainer looks at what it does to the model. What it looks for is told by the trainer's own config.

    > When to stop
        guard (`bool`, defaults to `True`): watch the model while training, stop in time and go back to the best state seen.
        guard_steps (`int`, *optional*): optimiser steps between two looks. Default: once per epoch.
        guard_examples (`int`, defaults to 512): examples looked at, at most.
    """

    guard: bool = True
    guard_steps: int | None = None
    guard_examples: int = 512


@dataclass
class ImageArguments:
    """How a trainer of a generator takes images and draws them.

    > Images
        resize (`bool`, defaults to `False`): scale and crop images that do not have the model's size.
        batch_size (`int`, defaults to 64): images drawn at a time.
    """

    resize: bool = False
    batch_size: int = 64


@dataclass
class DrawingArguments(ImageArguments):
    """What a trainer of a generator draws on the way, besides [`ImageArguments`].

    > Pictures
        grid_images (`int`, defaults to 16): images of the grids before, during and after, from the same noise; 0 for none.
        grid_steps (`int`, *optional*): optimiser steps between two grids. Default: only before and after.
        publish_before (`bool`, defaults to `False`): put the grid of the original beside the one that is published.
    """

    grid_images: int = 16
    grid_steps: int | None = None
    publish_before: bool = False
