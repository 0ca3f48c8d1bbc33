"""Small GANs of small grey images, trained on first use: what recipes, tests and benchmarks unlearn from."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..gan.config import GANConfig
from ..gan.dcgan import DCGANDiscriminator, DCGANGenerator
from ..gan.pipeline import GANPipeline
from ..gan.trainer import GANTrainer
from . import cache, generators
from .classifier import Told, quiet_bar


@dataclass(frozen=True)
class Recipe:
    """How a small GAN is trained.

    Attributes:
        dataset (`str`): as [`hf_unlearn.examples.datasets.load`] takes it; the split `train` is used.
        size (`int`): pixels in a row; the images are scaled to it.
        base_channels (`int`): of both players.
        steps (`int`): of [`GANTrainer`] with its defaults.
        latent_dim (`int`): length of z.
        seed (`int`): of weights, order and latents.
    """

    dataset: str
    size: int
    base_channels: int
    steps: int
    latent_dim: int = 64
    seed: int = 0


DIGITS = Recipe("digits", size=8, base_channels=32, steps=8_000)
FASHION_MNIST = Recipe("fashion_mnist", size=16, base_channels=32, steps=8_000)
NAMES = {"digits-gan": DIGITS, "fashion-mnist-gan": FASHION_MNIST}


def untrained(recipe: Recipe) -> GANPipeline:
    """A DCGAN as it begins."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        shape = {"sample_size": recipe.size, "channels": 1, "base_channels": recipe.base_channels}
        return GANPipeline(DCGANGenerator(latent_dim=recipe.latent_dim, **shape), DCGANDiscriminator(**shape))


def train(recipe: Recipe, images: Tensor, folder: str | Path, *, progress: bool = True) -> Path:
    """Train on `images` and save the pipeline, with its discriminator.

    Args:
        recipe (`Recipe`): everything but the images.
        images (`Tensor`): `[n, 1, size, size]` in [−1, 1].
        folder: gets the pipeline; complete or not there.
        progress (`bool`): say how long it takes.
    """
    with cache.saved(recipe, folder) as scratch, tempfile.TemporaryDirectory() as run:
        args = GANConfig(
            run,
            max_steps=recipe.steps,
            seed=recipe.seed,
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        states = random.getstate(), np.random.get_state()  # Trainer seeds all of Python
        with torch.random.fork_rng(devices=[]):
            trainer = GANTrainer(untrained(recipe), args, train_dataset=images)
            quiet_bar(trainer)
            trainer.add_callback(Told(Path(folder).name, quiet=not progress))
            trainer.train()
        random.setstate(states[0])
        np.random.set_state(states[1])
        trainer.pipeline.to("cpu").save_pretrained(scratch)
    return Path(folder)


def cached(recipe: Recipe, *, without: int | None = None, progress: bool = True) -> Path:
    """Folder of the GAN that a recipe makes, trained on first use (minutes on two cores).

    Args:
        without (`int`, *optional*): leave this class out of the training data: what unlearning should come to.
    """
    return generators.cached_generator("gan", recipe, train, without, progress)
