"""Samples as one picture: tiles with rings and badges, and which tile a click meant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


COLUMNS = 6
GAP = 10  # pixels around a tile, in which its ring is drawn
SMALLEST, LARGEST = 96, 192  # pixels of a tile's longer side
BLOCKED, UNDESIRED, CLEAN, PLAIN = "#d9480f", "#d9480f", "#1c7ed6", "#868e96"


@dataclass(frozen=True)
class Layout:
    """Where tiles are.

    Args:
        count, columns (`int`): of tiles.
        width, height (`int`): of one, in pixels, without the gap.
    """

    count: int
    columns: int
    width: int
    height: int

    @classmethod
    def of(cls, images: Tensor, columns: int = COLUMNS) -> Layout:
        """Of images `[n, channels, height, width]`; small ones by whole factors, so that pixels stay square."""
        n, _, height, width = images.shape
        longer = max(height, width)
        factor = -(-SMALLEST // longer) if longer < SMALLEST else min(1.0, LARGEST / longer)
        return cls(n, min(columns, max(n, 1)), max(1, round(width * factor)), max(1, round(height * factor)))

    @property
    def size(self) -> tuple[int, int]:
        rows = -(-self.count // self.columns)
        return self.columns * (self.width + 2 * GAP), rows * (self.height + 2 * GAP)

    def corner(self, place: int) -> tuple[int, int]:
        """Upper left pixel of a tile."""
        row, column = divmod(place, self.columns)
        return column * (self.width + 2 * GAP) + GAP, row * (self.height + 2 * GAP) + GAP

    def place(self, x: float, y: float) -> int | None:
        """The tile, or the gap around it, at a pixel; None where there is none."""
        column, row = int(x // (self.width + 2 * GAP)), int(y // (self.height + 2 * GAP))
        place = row * self.columns + column
        return place if 0 <= column < self.columns and row >= 0 and place < self.count else None


def tiles(
    images: Tensor,
    *,
    blocked: Sequence[bool] | None = None,
    marks: Sequence[str | None] | None = None,
    numbers: Sequence[int] | None = None,
    columns: int = COLUMNS,
) -> Image.Image:
    """One picture, transparent between the tiles.

    Args:
        images (`Tensor`): `[n, channels, height, width]` in [0, 1]; what is not finite is black.
        blocked (`Sequence[bool]`, *optional*): which get a thick ring.
        marks (`Sequence[str | None]`, *optional*): `"undesired"` (a cross) or `"clean"` (a tick) of each.
        numbers (`Sequence[int]`, *optional*): written below each.
        columns (`int`, defaults to 6).
    """
    layout = Layout.of(images, columns)
    picture = Image.new("RGBA", layout.size)
    draw = ImageDraw.Draw(picture)
    arrays = (images.float().nan_to_num(0, 0, 0).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    resampling = Image.Resampling.NEAREST if max(images.shape[-2:]) < SMALLEST else Image.Resampling.LANCZOS
    for place, array in enumerate(arrays):
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).convert("RGB")
        x, y = layout.corner(place)
        picture.paste(image.resize((layout.width, layout.height), resampling), (x, y))
        mark = marks[place] if marks else None
        box = (x, y, x + layout.width - 1, y + layout.height - 1)
        if blocked is not None and blocked[place]:
            _ring(draw, box, 7, BLOCKED)
        elif mark is not None:
            _ring(draw, box, 4, UNDESIRED if mark == "undesired" else CLEAN)
        else:
            _ring(draw, box, 1, PLAIN)
        if mark is not None:
            _badge(draw, x, y, mark)
        if numbers is not None:
            _number(draw, box, str(numbers[place]))
    return picture


def _ring(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], width: int, colour: str) -> None:
    left, top, right, bottom = box
    outside = (left - width - 1, top - width - 1, right + width + 1, bottom + width + 1)
    draw.rounded_rectangle(outside, radius=width, outline=colour, width=width)


def _badge(draw: ImageDraw.ImageDraw, x: int, y: int, mark: str) -> None:
    """A cross or a tick in the corner: told apart without colours too."""
    size = 22
    draw.rectangle((x, y, x + size, y + size), fill=UNDESIRED if mark == "undesired" else CLEAN)
    if mark == "undesired":
        lines = [((6, 6), (size - 6, size - 6)), ((6, size - 6), (size - 6, 6))]
    else:
        lines = [((5, 12), (9, 16)), ((9, 16), (size - 5, 6))]
    for line in lines:
        draw.line([(x + a, y + b) for a, b in line], fill="white", width=3)


def _number(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], text: str) -> None:
    font = ImageFont.load_default(13)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 8, bottom - top + 8
    corner = (box[2] - width + 1, box[3] - height + 1)
    draw.rectangle((*corner, box[2], box[3]), fill="#212529")
    draw.text((corner[0] + 4 - left, corner[1] + 4 - top), text, font=font, fill="white")
