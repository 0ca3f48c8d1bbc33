"""From what a pipeline draws to tensors that can be judged, and from tensors to what was asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from PIL.Image import Image
from torch import Tensor

from ...images import of_latents


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_ROUNDING = 1e-3


def asked_for(pipeline: DiffusionPipeline, wanted: str, *, cropped: bool = False) -> str:
    """The output type to ask a pipeline for, such that its images come as floats in [0, 1], and once.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): draws the images.
        wanted (`str`): what the caller asked for.
        cropped (`bool`, defaults to `False`): inpainting of a crop, which gives pictures and nothing else.
    """
    if wanted == "latent" or (cropped and wanted == "pil"):
        return wanted
    # Without an image processor "pt" may mean what comes out of the network: Kandinsky of diffusers 0.42 leaves it in
    # [−1, 1], DeepFloyd leaves out its own safety checker as well.
    plain = isinstance(pipeline, DDPMPipeline) or hasattr(pipeline, "image_processor")
    return "pt" if plain else "np"


def as_tensor(images: Any) -> tuple[Tensor, Tensor]:
    """Images that a pipeline gives, `[n, channels, height, width]` in [0, 1], where they are; and which are finite, on the CPU.

    Raises:
        ValueError: no such images.
    """
    if isinstance(images, list) and images and all(isinstance(image, Image) for image in images):
        if len({(image.size, image.mode) for image in images}) > 1:
            raise ValueError("images: are of several sizes or modes, which cannot be checked together")
        images = np.stack([np.asarray(image, dtype=np.float32) / 255 for image in images])
        images = images[..., None] if images.ndim == 3 else images
    if isinstance(images, np.ndarray) and images.ndim == 4:
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point() or not len(images):
        shape = f" of shape {list(images.shape)}" if hasattr(images, "shape") else ""
        raise ValueError(f"pipeline: gives images as {type(images).__name__}{shape}, which cannot be checked")
    # Of each image, and in one pass: NaN comes out of it, and is in no range.
    least, most = (value.cpu() for value in images.flatten(1).aminmax(dim=1))
    if ((least < -_ROUNDING) | (most > 1 + _ROUNDING)).any():
        raise ValueError("pipeline: gives images that are not in [0, 1], which cannot be checked")
    return images, least.isfinite() & most.isfinite()


def converted(images: Tensor, wanted: str, pipeline: DiffusionPipeline) -> list[Image] | np.ndarray | Tensor:
    """Images `[n, channels, height, width]` as the pipeline itself would give them, to the bit."""
    if wanted == "pt":
        return images.to(pipeline._execution_device)
    arrays = images.cpu().permute(0, 2, 3, 1).float().numpy()
    if wanted == "np":
        return arrays
    return getattr(pipeline, "image_processor", pipeline).numpy_to_pil(arrays)


def check_output_type(pipeline: DiffusionPipeline, wanted: Any) -> None:
    if wanted not in OUTPUT_TYPES:
        raise ValueError(f"output_type={wanted!r}: must be {', '.join(map(repr, OUTPUT_TYPES))}")
    if wanted == "latent" and not (hasattr(pipeline, "image_processor") and _vae(pipeline) is not None):
        raise ValueError(f"output_type='latent': {type(pipeline).__name__} has no vae to check what they show")


@torch.no_grad()
def decoded(latents: Tensor, pipeline: DiffusionPipeline) -> tuple[Tensor, Tensor]:
    """What latents show, as [`as_tensor`] gives it.

    Raises:
        ValueError: latents that the vae does not take as they are, packed ones for instance.
    """
    vae = _vae(pipeline)
    channels = getattr(vae.config, "latent_channels", None)
    if not isinstance(latents, Tensor) or latents.ndim != 4 or latents.shape[1] != channels or not len(latents):
        shape = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(f"output_type='latent': {shape} is not [n, {channels}, height, width], which can be checked")
    images = of_latents(latents, vae, pipeline._execution_device)
    pipeline.maybe_free_model_hooks()
    return as_tensor(pipeline.image_processor.postprocess(images, output_type="pt"))


def _vae(pipeline: DiffusionPipeline):
    return getattr(pipeline, "vae", None)
