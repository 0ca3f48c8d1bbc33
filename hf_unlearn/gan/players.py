"""The two players of a GAN, and the images they are shown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from ..files import loading
from ..modes import seeded_generator
from ..training.checks import check_single_precision
from .losses import path_lengths
from .pipeline import GANPipeline


class GAN(nn.Module):
    """Both players in one module, for Trainer and DDP: without images the generator's turn, with them the discriminator's.

    Everything that needs a graph happens in here: DDP and autocast take what is returned apart.
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module):
        super().__init__()
        self.generator, self.discriminator = generator, discriminator

    def forward(
        self,
        latents: Tensor,
        images: Tensor | None = None,
        false: Tensor | None = None,
        lengths_by: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of drawn images, and path lengths where they are asked for; or logits of images, and of drawn ones with
        `false` ones.
        """
        if images is None:
            drawn = self.generator(latents)
            lengths = None if lengths_by is None else path_lengths(drawn.sample, drawn.styles, lengths_by)
            return self.discriminator(drawn.sample).logits, lengths
        with torch.no_grad():
            drawn = self.generator(latents).sample
            drawn = drawn if false is None else torch.cat([drawn, false])
        return self.discriminator(images).logits, self.discriminator(drawn).logits


class Checked(dict):
    """A row whose image has been looked at when it came."""


class ImageTensors(TorchDataset):
    """Images in memory, `[n, channels, height, width]` in [−1, 1], as rows with `pixel_values`."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return Checked(pixel_values=self.images[row])


class Reshuffled(Sampler[int]):
    """`total` rows, permutation after permutation: a few images make full batches, and no epoch ends in between."""

    def __init__(self, size: int, total: int, seed: int):
        self.size, self.total, self.seed = size, total, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        for begin in range(0, self.total, self.size):
            order = torch.randperm(self.size, generator=seeded_generator("cpu", self.seed, begin // self.size))
            yield from order[: self.total - begin].tolist()


def as_pipeline(model: Any) -> tuple[GANPipeline, str | None]:
    """The pipeline, loaded if need be, and its name.

    Raises:
        ValueError: it is none, or not to be had.
    """
    if isinstance(model, str | Path):
        with loading("model", model, "a GANPipeline"):
            return GANPipeline.from_pretrained(str(model)), str(model)
    if not isinstance(model, GANPipeline):
        raise ValueError(
            f"model: {type(model).__name__} is no GANPipeline; pass GANPipeline(generator, discriminator)"
        )
    return model, model.config.get("_name_or_path")


def check_players(pipeline: GANPipeline) -> None:
    """Refuse a pipeline whose two players do not fit.

    Raises:
        ValueError: no discriminator, one of another size or number of channels, or weights in 16 bits.
    """
    if pipeline.discriminator is None:
        raise ValueError("model: the pipeline has no discriminator; pass GANPipeline(generator, discriminator)")
    for name in ("generator", "discriminator"):
        check_single_precision(getattr(pipeline, name).parameters(), f"model: the {name}'s weights")
    for name in ("sample_size", "channels"):
        sizes = [getattr(player.config, name) for player in (pipeline.generator, pipeline.discriminator)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"model: the generator's {name} is {sizes[0]}, the discriminator's {sizes[1]}; they must be equal"
            )
