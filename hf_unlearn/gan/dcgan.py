"""A deep convolutional GAN of small square images (arXiv 1511.06434), as two diffusers models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn


SMALLEST, LARGEST = 8, 64  # pixels in a row
COARSEST = 7  # the first map of a generator and the last of a discriminator is at most this wide
NORMS = ("pixel", "batch")


@dataclass
class GeneratorOutput(BaseOutput):
    """What a generator draws.

    Args:
        sample (`Tensor`): `[n, channels, size, size]`, about [−1, 1].
        styles (`Tensor`): the latents after the mapping network, those that the images were made of; `[n, …]`.
    """

    sample: Tensor
    styles: Tensor


@dataclass
class DiscriminatorOutput(BaseOutput):
    """What a discriminator says.

    Args:
        logits (`Tensor`): `[n]`, log-odds that the image is real.
        features (`Tensor`): `[n, d]`, what its last layer decides on.
    """

    logits: Tensor
    features: Tensor


def resolutions(sample_size: int) -> list[int]:
    """Widths of the maps from the image down to the coarsest: 28 gives 28, 14, 7; 9 gives 9, 5.

    Raises:
        ValueError: a size that is not supported.
    """
    if not SMALLEST <= sample_size <= LARGEST:
        raise ValueError(f"sample_size={sample_size}: must be from {SMALLEST} to {LARGEST} pixels")
    sizes = [sample_size]
    while sizes[-1] > COARSEST:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def _widths(sample_size: int, channels: int, base_channels: int, max_channels: int) -> tuple[list[int], list[int]]:
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: must be 1 (grey) or 3 (colour)")
    if not 1 <= base_channels <= max_channels:
        raise ValueError(f"base_channels={base_channels}: must be from 1 to max_channels={max_channels}")
    sizes = resolutions(sample_size)
    return sizes, [min(base_channels * 2**level, max_channels) for level in range(len(sizes))]


class PixelNorm(nn.Module):
    """Scales the vector of channels at every pixel to a mean square of one: no statistics, so batches do not matter."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class DCGANGenerator(ModelMixin, ConfigMixin):
    """Draws images from latents z ~ N(0, 1).

    Maps are enlarged by repeating pixels and convolved, where the paper has transposed convolutions: any size will do, and
    no chequerboards come.

    Args:
        sample_size (`int`, defaults to 32): pixels in a row, 8 to 64.
        channels (`int`, defaults to 1): 1 or 3.
        latent_dim (`int`, defaults to 128): length of z.
        base_channels (`int`, defaults to 64): of the finest map; doubled at each halving.
        max_channels (`int`, defaults to 512): at most so many.
        norm (`"pixel"` | `"batch"`, defaults to `"pixel"`): after each convolution. `"batch"` is the paper's.

    Raises:
        ValueError: an argument out of its range.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        channels: int = 1,
        latent_dim: int = 128,
        base_channels: int = 64,
        max_channels: int = 512,
        norm: str = "pixel",
    ):
        super().__init__()
        sizes, widths = _widths(sample_size, channels, base_channels, max_channels)
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r}: must be one of {', '.join(NORMS)}")
        if latent_dim < 1:
            raise ValueError(f"latent_dim={latent_dim}: must be ≥ 1")
        self.sizes = sizes[::-1]
        self.project = nn.Linear(latent_dim, widths[-1] * sizes[-1] ** 2)
        self.first_norm = _norm(norm, widths[-1])
        self.blocks = nn.ModuleList()
        for wide, narrow in zip(widths[:0:-1], widths[-2::-1], strict=True):
            self.blocks.append(nn.ModuleList([nn.Conv2d(wide, narrow, 3, padding=1), _norm(norm, narrow)]))
        self.to_image = nn.Conv2d(widths[0], channels, 3, padding=1)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one z."""
        return (self.config.latent_dim,)

    def map_latents(self, latents: Tensor, truncation: float = 1.0) -> Tensor:
        """z to w. There is no mapping network here: w is z, drawn toward its mean, 0, by `truncation` < 1.

        Args:
            latents (`Tensor`): z, `[n, latent_dim]`.
            truncation (`float`, defaults to 1.0): how far w is drawn to its mean, 1 not at all.
        """
        return latents if truncation == 1.0 else latents * truncation

    def synthesize(self, styles: Tensor) -> Tensor:
        """w to images, `[n, channels, size, size]` in [−1, 1].

        Args:
            styles (`Tensor`): w, `[n, latent_dim]`.
        """
        x = self.project(styles).unflatten(1, (-1, self.sizes[0], self.sizes[0]))
        x = F.leaky_relu(self.first_norm(x), 0.2)
        for size, (convolution, norm) in zip(self.sizes[1:], self.blocks, strict=True):
            x = F.interpolate(x, size=(size, size), mode="nearest")
            x = F.leaky_relu(norm(convolution(x)), 0.2)
        return torch.tanh(self.to_image(x))

    def forward(self, latents: Tensor, truncation: float = 1.0, return_dict: bool = True) -> GeneratorOutput | tuple:
        """Draw.

        Args:
            latents (`Tensor`): z, `[n, latent_dim]`.
            truncation (`float`, defaults to 1.0): how far w is drawn to its mean, 1 not at all.
            return_dict (`bool`, defaults to `True`): a [`GeneratorOutput`], or a tuple.
        """
        styles = self.map_latents(latents, truncation)
        output = GeneratorOutput(sample=self.synthesize(styles), styles=styles)
        return output if return_dict else output.to_tuple()


class DCGANDiscriminator(ModelMixin, ConfigMixin):
    """Tells real images from drawn ones. No normalisation: the gradient penalty R1 is for each image alone.

    Args:
        sample_size, channels, base_channels, max_channels: as for [`DCGANGenerator`].
    """

    @register_to_config
    def __init__(self, sample_size: int = 32, channels: int = 1, base_channels: int = 64, max_channels: int = 512):
        super().__init__()
        sizes, widths = _widths(sample_size, channels, base_channels, max_channels)
        self.from_image = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Conv2d(narrow, wide, 3, stride=2, padding=1)
            for narrow, wide in zip(widths[:-1], widths[1:], strict=True)
        )
        self.features = nn.Linear(widths[-1] * sizes[-1] ** 2, widths[-1])
        self.head = nn.Linear(widths[-1], 1)

    def forward(self, images: Tensor, return_dict: bool = True) -> DiscriminatorOutput | tuple:
        """Judge images `[n, channels, size, size]` in [−1, 1].

        Args:
            return_dict (`bool`, defaults to `True`): a [`DiscriminatorOutput`], or a tuple.
        """
        x = F.leaky_relu(self.from_image(images), 0.2)
        for convolution in self.blocks:
            x = F.leaky_relu(convolution(x), 0.2)
        features = F.leaky_relu(self.features(x.flatten(1)), 0.2)
        output = DiscriminatorOutput(logits=self.head(features).squeeze(1), features=features)
        return output if return_dict else output.to_tuple()


def _norm(kind: str, channels: int) -> nn.Module:
    return PixelNorm() if kind == "pixel" else nn.BatchNorm2d(channels)
