"""Settings that several families of trainers share."""

from __future__ import annotations

from dataclasses import dataclass


DRAWING_RANGES = {"≥ 0": ("grid_images",), "≥ 1": ("batch_size", "grid_steps")}


@dataclass
class DrawingArguments:
    """What a trainer of a generator draws on the way.

    > Pictures
        resize (`bool`, defaults to `False`): scale and crop images that do not have the model's size.
        batch_size (`int`, defaults to 64): images drawn at a time.
        grid_images (`int`, defaults to 16): images of the grids before, during and after, from the same noise; 0 for none.
        grid_steps (`int`, *optional*): optimiser steps between two grids. Default: only before and after.
        publish_before (`bool`, defaults to `False`): put the grid of the original beside the one that is published.
    """

    resize: bool = False
    batch_size: int = 64
    grid_images: int = 16
    grid_steps: int | None = None
    publish_before: bool = False
