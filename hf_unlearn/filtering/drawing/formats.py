"""From what a pipeline draws to tensors that can be judged, and from tensors to what was asked for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL.Image import Image
from torch import Tensor

from ...images import of_latents


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Fields of diffusers' outputs: what is drawn, images or videos; and what beside it shows nothing.
CONTENT = ("images", "image", "frames")
HARMLESS = (
    "nsfw_content_detected",
    "nsfw_detected",
    "watermark_detected",
    "applied_safety_concept",
    "text",
    "revised_prompts",
)
_ROUNDING = 1e-3


def content_of(pipeline: DiffusionPipeline) -> str | None:
    """Which field of its output holds what a pipeline draws, before anything is drawn: told by the classes of output that its
    `__call__` returns. None where that cannot be told, for a class without source: then the first draw tells.

    Raises:
        ValueError: no pictures and no videos, or something beside them that no filter looks at, as sound is.
    """
    kind = type(pipeline)
    call = inspect.unwrap(kind.__call__)
    arguments = inspect.signature(kind.__call__).parameters
    try:
        source = inspect.getsource(call)
    except (OSError, TypeError):
        source = ""
    outputs = _outputs(call, r"\breturn (\w+)\(", source)
    if not outputs:  # it returns a variable: what it says, or makes, of which there may be those of its models too
        said = _outputs(call, r"\b([A-Z]\w+)", source)
        outputs = [output for output in said if any(item.name in CONTENT for item in fields(output))] or said
    for output in outputs:
        check_fields(f"{kind.__name__}", output.__name__, [item.name for item in fields(output)])
    if not {"output_type", "return_dict"} <= set(arguments):
        raise ValueError(f"pipeline: {kind.__name__} draws no images that can be filtered")
    own = {item.name for output in outputs for item in fields(output)}
    return next((name for name in CONTENT if name in own), None)


def _outputs(call: Any, pattern: str, source: str) -> list[type]:
    found = [call.__globals__.get(name) for name in sorted(set(re.findall(pattern, source)))]
    return [output for output in found if isinstance(output, type) and issubclass(output, BaseOutput)]


def check_fields(pipeline: str, output: str, names: Sequence[str]) -> str:
    """The field of an output that holds what is drawn.

    Raises:
        ValueError: none, or others that hold something that is not filtered.
    """
    content = next((name for name in CONTENT if name in names), None)
    if content is None:
        raise ValueError(f"pipeline: {pipeline} gives a {output} without images or videos, so nothing can be filtered")
    if beside := [name for name in names if name not in (content, *HARMLESS)]:
        raise ValueError(f"pipeline: {pipeline} gives {beside[0]} too, which the filter does not look at")
    return content


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
    return "pt" if plain or hasattr(pipeline, "video_processor") else "np"


def as_tensor(images: Any) -> tuple[Tensor, Tensor]:
    """Images that a pipeline gives, `[n, channels, height, width]` in [0, 1], or videos, `[n, frames, channels, height, width]`,
    where they are; and which are finite, on the CPU.

    Raises:
        ValueError: no such images.
    """
    images = _stacked(images)
    if isinstance(images, np.ndarray) and images.ndim in (4, 5):
        images = torch.from_numpy(images).movedim(-1, -3)
    if (
        not isinstance(images, Tensor)
        or images.ndim not in (4, 5)
        or not images.is_floating_point()
        or not images.numel()
    ):
        shape = f" of shape {list(images.shape)}" if hasattr(images, "shape") else ""
        raise ValueError(f"pipeline: gives images as {type(images).__name__}{shape}, which cannot be checked")
    # Of each image, and in one pass: NaN comes out of it, and is in no range.
    least, most = (value.cpu() for value in images.flatten(1).aminmax(dim=1))
    if ((least < -_ROUNDING) | (most > 1 + _ROUNDING)).any():
        raise ValueError("pipeline: gives images that are not in [0, 1], which cannot be checked")
    return images, least.isfinite() & most.isfinite()


def _stacked(images: Any) -> Any:
    """Pictures as an array, and a list of videos as one; others as they are."""
    if not isinstance(images, list) or not images:
        return images
    if all(isinstance(image, Image) for image in images):
        if len({(image.size, image.mode) for image in images}) > 1:
            raise ValueError("images: are of several sizes or modes, which cannot be checked together")
        arrays = np.stack([np.asarray(image, dtype=np.float32) / 255 for image in images])
        return arrays[..., None] if arrays.ndim == 3 else arrays
    videos = [_stacked(video) for video in images]
    shapes = {getattr(video, "shape", None) for video in videos}
    if len(shapes) == 1 and all(getattr(video, "ndim", 0) == 4 for video in videos):
        return torch.stack(videos) if isinstance(videos[0], Tensor) else np.stack(videos)
    return images


def converted(
    images: Tensor, wanted: str, pipeline: DiffusionPipeline
) -> list[Image] | list[list[Image]] | np.ndarray | Tensor:
    """Images or videos, as [`as_tensor`] gives them, as the pipeline itself would give them, to the bit."""
    if wanted == "pt":
        return images.to(pipeline._execution_device)
    arrays = images.cpu().movedim(-3, -1).float().numpy()
    if wanted == "np":
        return arrays
    to_pil = getattr(pipeline, "image_processor", pipeline).numpy_to_pil
    return to_pil(arrays) if arrays.ndim == 4 else [to_pil(video) for video in arrays]


def check_output_type(pipeline: DiffusionPipeline, wanted: Any) -> None:
    if wanted not in OUTPUT_TYPES:
        raise ValueError(f"output_type={wanted!r}: must be {', '.join(map(repr, OUTPUT_TYPES))}")
    if wanted == "latent" and not (hasattr(pipeline, "image_processor") and _vae(pipeline) is not None):
        name = type(pipeline).__name__
        raise ValueError(f"output_type='latent': {name} has no vae of single images to see what images they show")


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
