"""Small diffusion models of small grey images, trained on first use: what recipes, tests and benchmarks unlearn from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor

from ..training.noise import NoiseSchedule
from . import cache, generators


@dataclass(frozen=True)
class Recipe:
    """How a small model is trained.

    Attributes:
        dataset (`str`): as [`hf_unlearn.examples.datasets.load`] takes it; the split `train` is used.
        size (`int`): pixels in a row; the images are scaled to it.
        channels (`tuple[int, int]`): of the U-Net's two levels.
        steps (`int`): of AdamW, batches of 64, learning rate up to 3e-3 and down to 0.
        seed (`int`): of weights, order and noise.
        checkpoints (`int`): how many of the second half of the training are kept, evenly spaced.
    """

    dataset: str
    size: int
    channels: tuple[int, int]
    steps: int
    seed: int = 0
    checkpoints: int = 8


DIGITS = Recipe("digits", size=8, channels=(24, 48), steps=4_000)
FASHION_MNIST = Recipe("fashion_mnist", size=16, channels=(24, 48), steps=3_000)
NAMES = {"digits-ddpm": DIGITS, "fashion-mnist-ddpm": FASHION_MNIST}


def untrained(recipe: Recipe) -> DDPMPipeline:
    """A U-Net with attention at its lower level, with DDIM as sampler."""
    torch.manual_seed(recipe.seed)
    unet = UNet2DModel(
        sample_size=recipe.size,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=recipe.channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
    )
    return DDPMPipeline(unet, DDIMScheduler(num_train_timesteps=1000))


def train(recipe: Recipe, images: Tensor, folder: str | Path, *, progress: bool = True) -> Path:
    """Train on `images` and save a pipeline with averaged weights, and beside it `checkpoint-<step>/unet` of the run.

    Args:
        recipe (`Recipe`): everything but the images.
        images (`Tensor`): `[n, 1, size, size]` in [−1, 1].
        folder: gets the pipeline; complete or not there.
        progress (`bool`): say how long it takes.

    Returns:
        `Path`: `folder`.
    """
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        pipeline = untrained(recipe)
    unet, schedule = pipeline.unet.train(), NoiseSchedule.of(pipeline.scheduler)
    average = EMAModel(unet.parameters(), decay=0.999)
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, recipe.steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(recipe.seed)
    kept = {round(recipe.steps * (1 + (i + 1) / recipe.checkpoints) / 2) for i in range(recipe.checkpoints)}
    with cache.saved(recipe, folder) as scratch:
        told = cache.Progress(folder.name, recipe.steps, quiet=not progress)
        for step in range(1, recipe.steps + 1):
            clean = images[torch.randint(len(images), (64,), generator=generator)]
            timesteps = torch.randint(len(schedule), (64,), generator=generator)
            noise = torch.randn(clean.shape, generator=generator)
            answer = unet(schedule.add_noise(clean, noise, timesteps), timesteps).sample
            optimizer.zero_grad()
            (answer - schedule.target(clean, noise, timesteps)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            decay.step()
            average.step(unet.parameters())
            told.step()
            if step in kept:
                unet.save_pretrained(Path(scratch, f"checkpoint-{step}", "unet"))
        average.copy_to(unet.parameters())
        pipeline.save_pretrained(scratch)
    return folder


def cached(recipe: Recipe, *, without: int | None = None, progress: bool = True) -> Path:
    """Folder of the model that a recipe makes, trained on first use (minutes on two cores).

    Args:
        without (`int`, *optional*): leave this class out of the training data: what unlearning should come to.
    """
    return generators.cached_generator("ddpm", recipe, train, without, progress)
