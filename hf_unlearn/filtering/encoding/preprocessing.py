"""Images of any kind to what an image encoder takes: the way of its own image processor, as one path of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...images import LUMINANCE, is_pil, of_pil, signed


RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, which processors are saved with
LONGEST = 64  # times the short side; a longer image loses its ends before it is resized and not after
UNLIKE = 5 / 255  # of the range of a pixel; PIL rounds to 8 bits after each of two passes


@dataclass(frozen=True)
class ImagePreprocessing:
    """How images become the input of an encoder: resize, crop the centre, normalize.

    PIL images and tensors take the same path, so an image is the same in both forms. It follows the image processors
    of transformers: they resize to 8-bit images and this does not round, so pixels differ by about one 255th. Where
    the shortest edge is resized, an image that is more than 64 times as long loses its ends first.

    Args:
        channels (`int`, *optional*, defaults to 3): 3 (RGB) or 1 (grey); `None` leaves them as they come.
        size (`tuple[int, int]` or `int`, *optional*): height and width, or the shortest edge; pixels. `None` leaves
            images as they are: then all must have one size.
        crop (`tuple[int, int]`, *optional*): height and width of the centre that is kept; black where the image is
            smaller. Needed where `size` is the shortest edge.
        resample (`str`, defaults to `"bilinear"`): `"bilinear"`, `"bicubic"` (both antialiased) or `"nearest"`.
        mean, std (`tuple[float, ...]`, defaults to 0.5, which is [-1, 1]): of pixels in [0, 1]; one number, or one a
            channel.

    Raises:
        ValueError: one of them is not as above.
    """

    channels: int | None = 3
    size: tuple[int, int] | int | None = None
    crop: tuple[int, int] | None = None
    resample: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self):
        for name in ("size", "crop", "mean", "std"):  # JSON has no tuples
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels: must be 1, 3 or None, got {self.channels!r}")
        for name in ("size", "crop"):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value, value)
            if value is not None and not (len(numbers) == 2 and all(type(n) is int and n > 0 for n in numbers)):
                raise ValueError(f"{name}: must be (height, width) in pixels, got {value!r}")
        if isinstance(self.crop, int):
            raise ValueError(f"crop: must be (height, width) in pixels, got {self.crop!r}")
        if isinstance(self.size, int) and self.crop is None:
            raise ValueError("crop: is needed where size is the shortest edge; or give size as (height, width)")
        if self.resample not in RESAMPLING.values():
            raise ValueError(f"resample: must be one of {', '.join(RESAMPLING.values())}, got {self.resample!r}")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if not (isinstance(value, tuple) and len(value) in (1, self.channels) and all(map(math.isfinite, value))):
                raise ValueError(f"{name}: must be one number or one for each channel, got {value!r}")
        if min(self.std) <= 0:
            raise ValueError(f"std: must be positive, got {self.std!r}")

    @classmethod
    def of(cls, processor: Any, config: Any = None) -> ImagePreprocessing:
        """What an image processor of transformers does; tried on a picture, so that nothing is left out unnoticed.

        Args:
            processor (image processor, *optional*): of ViT, CLIP, DINOv2, ConvNeXt and others that resize, crop,
                rescale and normalize. With `None`, images get `config.image_size`, if there is one, and stay in
                [-1, 1].
            config (`PreTrainedConfig`, *optional*): of the model; its `num_channels` (defaults to 3).

        Raises:
            ValueError: the processor does something else as well.
        """
        channels = getattr(config, "num_channels", None) or 3
        if processor is None:
            size = getattr(config, "image_size", None)
            return cls(channels, (size, size) if isinstance(size, int) else size)
        does = {step: getattr(processor, f"do_{step}", None) for step in ("resize", "center_crop", "normalize")}
        size, crop = _edges(processor, "size", does["resize"]), _edges(processor, "crop_size", does["center_crop"])
        if (kept := getattr(processor, "crop_pct", None)) and isinstance(
            size, int
        ):  # ConvNeXt: keeps a part, or warps
            size, crop = (int(size / kept), (size, size)) if size < 384 else ((size, size), None)
        scale = 255 * (processor.rescale_factor if getattr(processor, "do_rescale", True) else 1)
        mean = _numbers(processor.image_mean) if does["normalize"] else (0.0,)
        std = _numbers(processor.image_std) if does["normalize"] else (1.0,)
        number = 2 if getattr(processor, "resample", None) is None else int(processor.resample)
        made = cls(
            channels=channels,
            size=size,
            crop=(crop, crop) if isinstance(crop, int) else crop,
            resample=RESAMPLING.get(number, f"PIL's {number}"),
            mean=tuple(value / scale for value in mean),
            std=tuple(value / scale for value in std),
        )
        if not made._agrees_with(processor):
            raise ValueError(
                f"preprocessing: {type(processor).__name__} does more than resize, crop the centre and normalize; "
                "pass preprocessing=ImagePreprocessing(...)"
            )
        return made

    def prepare(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """Images as the encoder takes them; what comes out for one does not depend on the others.

        Args:
            images (list of `PIL.Image.Image`, or `Tensor`): PIL images of any mode and size, as for
                [`~hf_unlearn.images.of_pil`]. Or `[n, c, h, w]`, `c` 1 or 3, uint8, or float in [−1, 1]; prepared where
                it is.

        Returns:
            `Tensor`: `[n, channels, height, width]`, fp32. All NaN where an image has a pixel that is not finite.

        Raises:
            ValueError: the images are not as above, pixels are out of range, or sizes differ and stay so.
        """
        if isinstance(images, Tensor):
            return self._prepared(_checked(images))
        if not isinstance(images, (list, tuple)):
            hint = "; wrap it as [image]" if is_pil(images) else ""
            raise ValueError(
                f"images: must be a list of PIL images or a tensor [n, c, h, w], got {type(images).__name__}{hint}"
            )
        if odd := [type(image).__name__ for image in images if not is_pil(image)]:
            raise ValueError(f"images: must be PIL images or one tensor [n, c, h, w], got {odd[0]} in a list")
        if not images:
            raise ValueError("images: is empty, pass at least one")
        prepared = [
            self._prepared(of_pil(image, f"images: image {number}")[None]) for number, image in enumerate(images)
        ]
        if len(shapes := {tuple(image.shape[1:]) for image in prepared}) > 1:
            raise ValueError(f"images: have shapes {sorted(shapes)}, which stay as they are; set size and channels")
        return torch.cat(prepared)

    def _prepared(self, images: Tensor) -> Tensor:
        broken = ~images.isfinite().flatten(1).all(1)
        pixels = (images + 1) / 2
        if self.channels == 1 and pixels.shape[1] == 3:
            pixels = (pixels * pixels.new_tensor(LUMINANCE).reshape(-1, 1, 1)).sum(1, keepdim=True)
        pixels = self._resized(pixels.clamp(0, 1))
        if self.crop is not None:
            top, left = (-((side - kept) // 2) for side, kept in zip(pixels.shape[-2:], self.crop, strict=True))
            bottom = self.crop[0] - pixels.shape[-2] - top
            right = self.crop[1] - pixels.shape[-1] - left
            pixels = F.pad(pixels, (left, right, top, bottom))  # less than 0 takes away
        if self.channels is not None:
            pixels = pixels.expand(-1, self.channels, -1, -1)
        mean, std = (pixels.new_tensor(value).reshape(-1, 1, 1) for value in (self.mean, self.std))
        return ((pixels - mean) / std).masked_fill(broken.reshape(-1, 1, 1, 1), torch.nan)

    def _resized(self, pixels: Tensor) -> Tensor:
        size = self.size
        if isinstance(size, int):
            longest = LONGEST * max(1, -(-max(self.crop) // size)) * min(pixels.shape[-2:])
            for dim in (-2, -1):
                if (excess := pixels.shape[dim] - longest) > 0:
                    pixels = pixels.narrow(dim, excess // 2, longest)
            short = min(pixels.shape[-2:])
            size = tuple(int(self.size * side / short) for side in pixels.shape[-2:])
        if size is None or size == tuple(pixels.shape[-2:]):
            return pixels
        if self.resample == "nearest":
            return F.interpolate(pixels, size, mode="nearest-exact")
        # As PIL 13, which is also cheaper: rows first, unless they grow and columns shrink. Neither pass leaves [0, 1].
        # Each is along the last dimension: torch 2.13 is wrong along the other where the last has one pixel.
        height, width = pixels.shape[-2:]
        for dim in (-2, -1) if size[1] > width and size[0] < height else (-1, -2):
            lines = pixels.transpose(dim, -1)
            lines = F.interpolate(lines, (lines.shape[-2], size[dim]), mode=self.resample, antialias=True)
            pixels = lines.clamp(0, 1).transpose(dim, -1)
        return pixels

    def _agrees_with(self, processor: Any) -> bool:
        picture = example(self.channels)
        try:
            stock = torch.as_tensor(processor(images=picture, return_tensors="pt")["pixel_values"][0])
        except (TypeError, ValueError, KeyError, RuntimeError):
            return False
        ours = self.prepare([picture])[0]
        std = ours.new_tensor(self.std).reshape(-1, 1, 1)
        return ours.shape == stock.shape and bool(((ours - stock).abs() * std).max() <= UNLIKE)


def example(channels: int | None = 3) -> Image.Image:
    """A smooth picture, another in every direction and channel; 128 × 96."""
    across, down = np.meshgrid(np.linspace(0, 1, 128), np.linspace(0, 1, 96))
    bands = np.stack([across, down**2, 1 - across * down], -1) * 200 + 20
    return Image.fromarray(bands.astype(np.uint8)).convert("L" if channels == 1 else "RGB")


def _edges(processor: Any, name: str, does: bool | None) -> tuple[int, int] | int | None:
    edges = dict(getattr(processor, name, None) or {}) if does else {}
    known = {key: value for key, value in edges.items() if value is not None}
    if not known:
        return None
    if known.keys() == {"shortest_edge"}:
        return known["shortest_edge"]
    if known.keys() == {"height", "width"}:
        return known["height"], known["width"]
    raise ValueError(f"preprocessing: {type(processor).__name__} has {name} {known}; pass preprocessing=")


def _numbers(values: float | Sequence[float]) -> tuple[float, ...]:
    return tuple(values) if isinstance(values, Sequence) else (float(values),)


def _checked(images: Tensor) -> Tensor:
    """In [−1, 1], fp32, after checks; a value that is not finite passes."""
    if images.ndim != 4 or not images.numel():
        raise ValueError(f"images: must be a tensor [n, c, h, w] in [−1, 1], got {images.dtype} {list(images.shape)}")
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images: must have 1 (grey) or 3 (RGB) channels, got {images.shape[1]}; convert them")
    return signed(images, "images", whole=False)
