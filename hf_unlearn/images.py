"""Images to tensors in [−1, 1], and tensors to a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


IMAGE_COLUMNS = ("pixel_values", "image", "images")
SMALLEST = 64  # pixels; in a grid, smaller images are enlarged, each pixel a square


def image_column(columns: Iterable[str], argument: str) -> str:
    """Which of the columns holds the images.

    Raises:
        ValueError: none.
    """
    column = next((name for name in IMAGE_COLUMNS if name in columns), None)
    if column is None:
        raise ValueError(
            f"{argument}: has no images; name the column one of {', '.join(IMAGE_COLUMNS)} (rename_column)"
        )
    return column


def pixels(
    images: Sequence[Any], shape: tuple[int, int, int], *, resize: bool, argument: str = "forget_dataset"
) -> Tensor:
    """Images as tensors in [−1, 1], `[n, channels, height, width]`, fp32.

    Args:
        images: PIL images, or arrays and tensors `[channels, height, width]` that are in [−1, 1] already.
        shape: `(channels, height, width)` of the model.
        resize (`bool`): fit PIL images to the model: the short side scaled, the rest cropped at the centre.

    Raises:
        ValueError: another size or number of channels, or pixels that are not finite.
    """
    channels, height, width = shape
    if hasattr(images[0], "getbands"):
        if channels not in (1, 3):
            raise ValueError(f"{argument}: PIL images cannot have the model's {channels} channels; pass pixel_values")
        bands = {len(image.getbands()) for image in images}
        if channels == 1 and bands != {1}:
            raise ValueError(
                f"{argument}: images have {max(bands)} channels, the model has 1; convert them to grey first"
            )
        # Before they are resized: PIL picks single pixels where an image has a palette.
        images = [image.convert("RGB" if channels == 3 else "L") for image in images]
        if resize:
            images = [_fitted(image, height, width) for image in images]
        if odd := [image.size for image in images if image.size != (width, height)]:
            raise ValueError(
                f"{argument}: an image is {odd[0][0]} × {odd[0][1]}, the model draws {width} × {height}; set resize=True"
            )
        from diffusers.image_processor import VaeImageProcessor

        tensors = VaeImageProcessor(do_resize=False, vae_scale_factor=1).preprocess(images)
    else:
        arrays = [image if isinstance(image, Tensor) else torch.as_tensor(np.asarray(image)) for image in images]
        if odd := [tuple(array.shape) for array in arrays if tuple(array.shape) != tuple(shape)]:
            raise ValueError(f"{argument}: an image has shape {odd[0]}, the model's is {tuple(shape)}; resize it")
        tensors = torch.stack(arrays).float()
        if not torch.isfinite(tensors).all():
            raise ValueError(f"{argument}: an image holds NaN or infinite pixels; remove it")
        if tensors.abs().max() > 1.01:
            raise ValueError(
                f"{argument}: pixel values reach {tensors.abs().max():.3g}, the model's are in [−1, 1]; rescale them"
            )
    return tensors.clamp(-1, 1)


def _fitted(image: Any, height: int, width: int) -> Any:
    return ImageOps.fit(image, (width, height), method=3)  # bicubic


def grey_images(dataset, size: int) -> Tensor:
    """The column `image` as `[n, 1, size, size]` in [−1, 1], fp32."""
    arrays = [
        np.asarray(image.convert("L").resize((size, size), resample=3), np.float32) for image in dataset["image"]
    ]
    return torch.from_numpy(np.stack(arrays))[:, None] / 127.5 - 1


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """One picture of images `[n, channels, height, width]` in [−1, 1], in rows of `columns` (default: a square)."""
    from diffusers.utils import make_image_grid

    columns = columns or max(1, round(len(images) ** 0.5))
    images = images[: len(images) // columns * columns] if len(images) >= columns else images
    columns = min(columns, len(images))
    arrays = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in arrays]
    scale = max(1, -(-SMALLEST // pictures[0].width))
    pictures = [
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) for image in pictures
    ]
    framed = [ImageOps.expand(image.convert("RGB"), border=2, fill="#868e96") for image in pictures]
    return make_image_grid(framed, rows=len(framed) // columns, cols=columns)


@torch.no_grad()
def of_latents(latents: Tensor, vae: nn.Module, device: torch.device | str) -> Tensor:
    """What a VAE makes of scaled latents `[n, channels, height, width]`, about in [−1, 1]: its shift, its factor, and the mean and
    the deviation of its channels are undone first.
    """
    config, dtype = vae.config, vae.dtype
    latents = latents / (getattr(config, "scaling_factor", None) or 1)
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        mean, std = (torch.tensor(value).to(latents).view(1, -1, 1, 1) for value in (mean, std))
        latents = latents * std + mean
    latents = latents + (getattr(config, "shift_factor", None) or 0)
    # SDXL's first vae overflows in half precision.
    overflows = dtype == torch.float16 and getattr(config, "force_upcast", False)
    if overflows:
        vae.to(dtype=torch.float32)
    try:
        return vae.decode(latents.to(device, vae.dtype), return_dict=False)[0]
    finally:
        if overflows:
            vae.to(dtype=dtype)


def decode(latents: Tensor, pipeline: DiffusionPipeline, *, batch_size: int = 8) -> Tensor:
    """Images of VAE latents, `[n, channels, height, width]` in [−1, 1], fp32 on the CPU."""
    vae = pipeline.vae
    parts = [of_latents(part, vae, vae.device).float().cpu() for part in latents.split(batch_size)]
    return torch.cat(parts).clamp(-1, 1)
