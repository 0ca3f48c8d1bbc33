"""Samples that somebody looks at in the browser, and what they marked them as."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .tiles import KINDS


if TYPE_CHECKING:
    from ..jobs.filter.source import Batch

Mark = Literal["undesired", "clean"]
PAGE = 48  # samples on one
MOST = 960  # samples of a visitor, of which all stay in memory


@dataclass
class Marks:
    """Pages of samples and the marks on them.

    Args:
        images (`Tensor`, *optional*): `[n, channels, height, width]` in [−1, 1], fp16.
        latents (`Tensor`, *optional*): of a GAN.
        kinds (`dict[int, str]`): mark of a sample by its number.
        prompts (`list[str]`): of each sample; empty where there are none.
    """

    images: Tensor | None = None
    latents: Tensor | None = None
    kinds: dict[int, Mark] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return 0 if self.images is None else len(self.images)

    @property
    def pages(self) -> int:
        return -(-len(self) // PAGE)

    def numbers(self, page: int) -> range:
        """Of the samples on a page, from 0."""
        return range(page * PAGE, min((page + 1) * PAGE, len(self)))

    def add(self, batch: Batch, prompts: list[str] | None = None) -> None:
        """Take in samples.

        Raises:
            ValueError: of another size than those before: the pipeline changed.
        """
        images = batch.images.half()
        if self.images is not None and images.shape[1:] != self.images.shape[1:]:
            raise ValueError("samples: have another size than those before; begin anew")
        self.images = images if self.images is None else torch.cat([self.images, images])
        if batch.latents is not None:
            self.latents = batch.latents if self.latents is None else torch.cat([self.latents, batch.latents])
        self.prompts += [prompts[number % len(prompts)] for number in batch.numbers] if prompts else []

    def click(self, number: int, kind: Mark) -> None:
        """Mark a sample; a second click takes the mark away, one of the other kind changes it.

        Raises:
            ValueError: there is no such sample, or no such kind.
        """
        if kind not in KINDS:
            raise ValueError(f"marks: {kind!r} is none; there are {' and '.join(KINDS)}")
        if type(number) is not int or not 0 <= number < len(self):
            raise ValueError(f"marks: {number} is no sample; there are 0 to {len(self) - 1}")
        if self.kinds.get(number) == kind:
            del self.kinds[number]
        else:
            self.kinds[number] = kind

    def write(self, kind: Mark, text: str) -> None:
        """All marks of a kind, as numbers: `"3 17 42"`.

        Raises:
            ValueError: a word that is no number, or a number of no sample; the marks stay as they were.
        """
        words = re.split(r"[\s,;]+", text.strip()) if text.strip() else []
        if odd := [word for word in words if not word.isdecimal() or int(word) >= len(self)]:
            raise ValueError(f"{kind}: {odd[0][:20]!r} is no sample; there are 0 to {len(self) - 1}")
        others = {number: of for number, of in self.kinds.items() if of != kind}
        self.kinds = others | {int(word): kind for word in words}

    def of(self, kind: Mark, *, rest_is_clean: bool = False) -> list[int]:
        """Numbers of the samples of a kind; with `rest_is_clean` those without a mark are clean."""
        if kind == "clean" and rest_is_clean:
            return [number for number in range(len(self)) if self.kinds.get(number) != "undesired"]
        return sorted(number for number, of in self.kinds.items() if of == kind)

    def seen(self, numbers: list[int], *, latents: bool) -> Tensor:
        """What a fitter is given of these samples."""
        return self.latents[numbers] if latents else self.images[numbers].float()
