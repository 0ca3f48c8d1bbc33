"""Seeded samples of a diffusion pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...modes import in_eval_mode
from .architecture import Architecture
from .pipelines import architecture_of
from .text_side import quiet


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@contextmanager
def _quiet(architecture: Architecture) -> Iterator[None]:
    """Eval mode without progress bars, and without a line for each batch of long prompts, and afterwards as before."""
    pipeline = architecture.pipe_that_draws
    shown = getattr(pipeline, "_progress_bar_config", None)
    pipeline.set_progress_bar_config(disable=True)
    try:
        with quiet(), in_eval_mode(architecture.denoiser):
            yield
    finally:
        if shown is None:
            del pipeline._progress_bar_config
        else:
            pipeline._progress_bar_config = shown


def steps_of(pipeline: DiffusionPipeline, num_inference_steps: int | None) -> int:
    """Denoising steps that are drawn with: what is given, or the pipeline's own, as far as its scheduler has them."""
    if num_inference_steps is not None:
        return num_inference_steps
    default = inspect.signature(pipeline.__call__).parameters["num_inference_steps"].default
    return min(default, pipeline.scheduler.config.num_train_timesteps)


@torch.no_grad()
def generate(
    pipeline: DiffusionPipeline,
    what: int | Sequence[str],
    *,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 64,
    latents: bool = False,
) -> Tensor:
    """Samples of a pipeline by its own sampler. Image i is a function of the weights, `seed` and i, whatever the batch size.

    Args:
        what (`int` | `Sequence[str]`): how many images, or one prompt for each.
        seed (`int`): of the noise that they begin as.
        num_inference_steps (`int`, *optional*): denoising steps. Default: the pipeline's own.
        guidance_scale (`float`, *optional*): of classifier-free guidance. Default: the pipeline's own.
        batch_size (`int`): images at a time.
        latents (`bool`, defaults to `False`): give what the denoiser made, before the VAE.

    Returns:
        `Tensor`: `[n, channels, height, width]` on the CPU, fp32: images in [−1, 1], or latents.
    """
    count = what if isinstance(what, int) else len(what)
    architecture, options = (
        architecture_of(pipeline),
        {"num_inference_steps": steps_of(pipeline, num_inference_steps)},
    )
    if architecture.is_prompted and guidance_scale is not None:
        options["guidance_scale"] = guidance_scale
    seeds = np.random.SeedSequence(seed).generate_state(count, np.uint64)
    out = []
    with _quiet(architecture):
        for begin in range(0, count, batch_size):
            part = slice(begin, min(begin + batch_size, count))
            # On the CPU, so that every device begins from the same noise.
            generators = [torch.Generator().manual_seed(int(value) % 2**63) for value in seeds[part]]
            asked = what[part] if architecture.is_prompted else len(generators)
            images = architecture.draw(asked, latents, generator=generators, **options)
            if not isinstance(images, Tensor):
                images = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2) * 2 - 1
            out.append(images.float().cpu())
    return torch.cat(out).contiguous()
