"""Samples as tiles of a page: what is blocked has a ring, what is marked a badge, and where they are to be marked they are buttons.

Pictures go into the page itself: nothing is written to a disk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ..images import data_uri


SMALL, LARGEST = (
    64,
    224,
)  # pixels of the longer side: kept to the pixel up to the first, and shown with the second at most
KINDS = ("undesired", "clean")


def tiles(
    images: Tensor,
    *,
    numbers: Sequence[int],
    blocked: Sequence[bool] | None = None,
    marks: Sequence[str | None] | None = None,
    titles: Sequence[str] = (),
) -> str:
    """HTML of a grid.

    Args:
        images (`Tensor`): `[n, channels, height, width]` in [0, 1]; what is not finite is black.
        numbers (`Sequence[int]`): of each, written below it.
        blocked (`Sequence[bool]`, *optional*): which get a ring.
        marks (`Sequence[str | None]`, *optional*): `"undesired"`, `"clean"` or None of each; with it tiles are buttons.
        titles (`Sequence[str]`, *optional*): shown where a pointer rests on one, as prompts are.
    """
    from html import escape

    element = "span" if marks is None else 'button type="button"'
    parts = []
    for place, (picture, number) in enumerate(zip(_pictures(images), numbers, strict=True)):
        words = [word for word in (marks and marks[place], "blocked" if blocked and blocked[place] else None) if word]
        about = f"sample {number}{''.join(f', {word}' for word in words)}"
        title = f' title="{escape(titles[place])}"' if titles else ""
        parts.append(
            f'<{element} class="{" ".join(["tile", *words])}" data-number="{number}" aria-label="{about}"{title}>'
            f'<img alt="" src="{picture}"><b>{number}</b></{element.split()[0]}>'
        )
    return f'<div class="tiles">{"".join(parts)}</div>'


def _pictures(images: Tensor) -> list[str]:
    """As data addresses."""
    arrays = (images.float().nan_to_num(0, 0, 0).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    small = max(images.shape[-2:]) <= SMALL
    found = []
    for array in arrays:
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        if not small:
            image.thumbnail((LARGEST, LARGEST))
        found.append(data_uri(image) if small else data_uri(image, form="WEBP", quality=90))
    return found
