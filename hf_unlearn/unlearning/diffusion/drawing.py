"""Diffusion pipelines as an unlearning run needs them: images and prompts in, what the denoiser sees; seeded samples out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from ...images import image_column, pixels
from ...modes import in_eval_mode


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


PROMPT_COLUMNS = ("prompt", "text", "caption")


class EncodedImages(TorchDataset):
    """Images as the denoiser sees them, in memory on the CPU, with what it is told about them.

    Args:
        latents (`Tensor`): clean inputs, `[n, channels, height, width]`: images in [−1, 1], or means of VAE latents, scaled.
        latents_std (`Tensor`, *optional*): standard deviation of the VAE's posterior, same shape; each use draws from it.
        conditioning (`dict[str, Tensor]`): keyword arguments of the denoiser's forward, a row of a table each.
        rows (`Tensor`, *optional*): `[n]`, the row of the tables that belongs to each image.
    """

    def __init__(
        self,
        latents: Tensor,
        latents_std: Tensor | None = None,
        conditioning: dict[str, Tensor] | None = None,
        rows: Tensor | None = None,
    ):
        self.latents, self.latents_std = latents, latents_std
        self.conditioning = conditioning or {}
        self.rows = torch.arange(len(latents)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int | Tensor) -> dict[str, Any]:
        """One image, or a batch of those that a tensor of indices names."""
        item = {"latents": self.latents[index]}
        if self.latents_std is not None:
            item["latents_std"] = self.latents_std[index]
        if self.conditioning:
            item["conditioning"] = {name: table[self.rows[index]] for name, table in self.conditioning.items()}
        return item

    def select(self, keep: Tensor) -> EncodedImages:
        """The images that a mask or a list of indices names."""
        std = None if self.latents_std is None else self.latents_std[keep]
        return EncodedImages(self.latents[keep], std, self.conditioning, self.rows[keep])


def check_denoiser(unet: Any) -> None:
    """Refuse what is no denoiser that can be trained here.

    Raises:
        ValueError: another architecture, or one that must be told more than a prompt.
    """
    if not isinstance(unet, (UNet2DModel, UNet2DConditionModel)):
        raise ValueError(
            f"model: {type(unet).__name__} is not supported; pass a UNet2DModel, a UNet2DConditionModel or their pipeline"
        )
    needs = next(
        (key for key in ("class_embed_type", "num_class_embeds", "addition_embed_type") if unet.config.get(key)), None
    )
    if needs:
        raise ValueError(
            f"model: its {needs}={unet.config[needs]!r} needs more than an image and a prompt, which is not supported yet"
        )
    channels, answered = unet.config.in_channels, unet.config.out_channels
    if answered not in (channels, 2 * channels):  # inpainting, upscaling, depth; twice as many: a learned variance
        raise ValueError(
            f"model: it sees {channels} channels and answers {answered}; only denoisers of an image alone are supported"
        )


def is_prompted(pipeline: DiffusionPipeline) -> bool:
    """Whether its denoiser is told what to draw."""
    return isinstance(pipeline.unet, UNet2DConditionModel)


def resolution(pipeline: DiffusionPipeline) -> tuple[int, int, int]:
    """`(channels, height, width)` of the images that a pipeline makes."""
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    if is_prompted(pipeline):
        scale = pipeline.vae_scale_factor
        return pipeline.vae.config.in_channels, height * scale, width * scale
    return pipeline.unet.config.in_channels, height, width


# Images and prompts in


@torch.no_grad()
def encode(
    dataset: Any,
    pipeline: DiffusionPipeline,
    *,
    device: torch.device | str,
    resize: bool = False,
    batch_size: int = 8,
    argument: str = "forget_dataset",
) -> EncodedImages:
    """What the denoiser sees of a dataset of images (and prompts).

    Args:
        dataset: rows with `image` (PIL) or `pixel_values` (in [−1, 1]) and, for a prompted model, `prompt`, `text` or
            `caption`.
        device: where VAE and text encoder run.
        argument (`str`): what to call the dataset in an error.

    Raises:
        ValueError: a column is missing, or an image does not fit the model.
    """
    if len(dataset) == 0:
        raise ValueError(f"{argument}: is empty; pass rows, or leave it out")
    first = dataset[0]
    column = image_column(first, argument)
    prompted, shape = is_prompted(pipeline), resolution(pipeline)
    prompt_column = next((name for name in PROMPT_COLUMNS if name in first), None)
    if prompted and prompt_column is None:
        raise ValueError(
            f"{argument}: prompts are missing for a prompted model; add a column named one of {', '.join(PROMPT_COLUMNS)}"
        )
    means, stds, prompts = [], [], []
    for begin in range(0, len(dataset), batch_size):
        rows = [dataset[row] for row in range(begin, min(begin + batch_size, len(dataset)))]
        for name in (column, prompt_column) if prompted else (column,):
            if empty := [begin + row for row, values in enumerate(rows) if values[name] is None]:
                raise ValueError(f"{argument}: row {empty[0]} has no {name}; remove it or fill it in")
        images = pixels([row[column] for row in rows], shape, resize=resize, argument=argument)
        if not prompted:
            means.append(images)
            continue
        prompts += [str(row[prompt_column]) for row in rows]
        vae = pipeline.vae.to(device)
        posterior = vae.encode(images.to(device, vae.dtype)).latent_dist
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        means.append(((posterior.mean.float() - shift) * vae.config.scaling_factor).cpu())
        stds.append((posterior.std.float() * vae.config.scaling_factor).cpu())
    conditioning, rows = encode_prompts(prompts, pipeline, device=device) if prompted else ({}, None)
    return EncodedImages(torch.cat(means), torch.cat(stds) if stds else None, conditioning, rows)


@torch.no_grad()
def encode_prompts(
    prompts: Sequence[str], pipeline: DiffusionPipeline, *, device: torch.device | str
) -> tuple[dict[str, Tensor], Tensor]:
    """`(conditioning, rows)`: each different prompt once, as keyword arguments of the denoiser, and which one each is."""
    different = sorted(set(prompts))
    pipeline.text_encoder.to(device)
    tables = [
        pipeline.encode_prompt(different[begin : begin + 64], device, 1, do_classifier_free_guidance=False)[0]
        .float()
        .cpu()
        for begin in range(0, len(different), 64)
    ]
    place = {prompt: row for row, prompt in enumerate(different)}
    return {"encoder_hidden_states": torch.cat(tables)}, torch.tensor([place[prompt] for prompt in prompts])


def some_prompts(dataset: Any, count: int) -> list[str]:
    """The first different prompts of a dataset, at most `count` of its first hundred rows."""
    rows = [dataset[row] for row in range(min(len(dataset), 100))] if not isinstance(dataset, EncodedImages) else []
    column = next((name for name in PROMPT_COLUMNS if rows and name in rows[0]), None)
    return [] if column is None else list(dict.fromkeys(str(row[column]) for row in rows))[:count]


# Samples out


@contextmanager
def _quiet(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Eval mode without progress bars, and afterwards as before."""
    shown = getattr(pipeline, "_progress_bar_config", None)
    pipeline.set_progress_bar_config(disable=True)
    try:
        with in_eval_mode(pipeline.unet):
            yield
    finally:
        if shown is None:
            del pipeline._progress_bar_config
        else:
            pipeline._progress_bar_config = shown


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
    if num_inference_steps is None:  # the pipeline's own may be more than the scheduler has
        default = inspect.signature(pipeline.__call__).parameters["num_inference_steps"].default
        num_inference_steps = min(default, pipeline.scheduler.config.num_train_timesteps)
    steps = {"num_inference_steps": num_inference_steps}
    seeds = np.random.SeedSequence(seed).generate_state(count, np.uint64)
    out = []
    with _quiet(pipeline):
        for begin in range(0, count, batch_size):
            part = slice(begin, min(begin + batch_size, count))
            # On the CPU, so that every device begins from the same noise.
            generators = [torch.Generator().manual_seed(int(value) % 2**63) for value in seeds[part]]
            if is_prompted(pipeline):
                guidance = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
                images = pipeline(
                    list(what[part]),
                    generator=generators,
                    output_type="latent" if latents else "np",
                    **steps,
                    **guidance,
                ).images
            else:
                images = pipeline(batch_size=len(generators), generator=generators, output_type="np", **steps).images
            if not isinstance(images, Tensor):
                images = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2) * 2 - 1
            out.append(images.float().cpu())
    return torch.cat(out).contiguous()


@torch.no_grad()
def decode(latents: Tensor, pipeline: DiffusionPipeline, *, batch_size: int = 8) -> Tensor:
    """Images of VAE latents, `[n, channels, height, width]` in [−1, 1], fp32 on the CPU."""
    vae = pipeline.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    out = [
        vae.decode((part / vae.config.scaling_factor + shift).to(vae.device, vae.dtype)).sample.float().cpu()
        for part in latents.split(batch_size)
    ]
    return torch.cat(out).clamp(-1, 1)
