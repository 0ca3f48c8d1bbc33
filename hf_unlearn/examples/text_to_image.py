"""A small text-to-image pipeline of coloured digits, trained on first use: a concept asked for by words, to be forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..images import pixels
from . import cache
from .captions import WORDS, meaning, read
from .coloured_digits import SIZE, coloured_digits
from .text_to_image_parts import FAMILIES, Family


if TYPE_CHECKING:
    from datasets import DatasetDict


BATCH = 64
READER_BATCH, READER_LEARNING_RATE = 128, 3e-3
DROPPED = 0.10  # share of captions that are not said, for classifier-free guidance (arXiv 2207.12598)
VAE_LEARNING_RATE, KL_WEIGHT = 2e-3, 1e-4


@dataclass(frozen=True)
class TextToImageRecipe:
    """What a small text-to-image pipeline depends on.

    Attributes:
        family (`str`, defaults to `"stable_diffusion"`): or `"sd3"`, a flow-matching transformer that reads with three encoders.
        examples (`int`, defaults to 20000): pictures with captions, see [`coloured_digits`].
        without (`str`, *optional*): a word such as `"three"`: the twin of which no part ever saw what it names, whatever it is called.
            Its tokenizer has the word, as the original's.
        steps (`int`, defaults to 3000): of AdamW on batches of 64, of the denoiser.
        reader_steps (`int`, defaults to 600): before, of the text encoder, which learns what captions say and then stays as it is.
        vae_steps (`int`, defaults to 1000): before, of the VAE.
        learning_rate (`float`, defaults to 1e-3): at its highest.
        channels (`tuple[int, int]`, *optional*): of the U-Net's two levels, by default `(64, 96)`; of a transformer, its width and how
            many layers it has, by default `(64, 4)`.
        checkpoints (`int`, defaults to 8): how many denoisers of the second half of the training are kept, evenly spaced.
        data_seed (`int`, defaults to 0): of the pictures and captions.
        seed (`int`, defaults to 0): of weights, order and noise.
    """

    family: str = "stable_diffusion"
    examples: int = 20_000
    without: str | None = None
    steps: int = 3_000
    reader_steps: int = 600
    vae_steps: int = 1_000
    learning_rate: float = 1e-3
    channels: tuple[int, int] | None = None
    checkpoints: int = 8
    data_seed: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"family={self.family!r}: must be one of {', '.join(FAMILIES)}")
        if self.channels is None:
            object.__setattr__(self, "channels", FAMILIES[self.family].channels)  # the recipe is kept with the model
        if self.without is not None:
            meaning(self.without, "without")
        if self.checkpoints > self.steps // 2:
            raise ValueError(
                f"checkpoints={self.checkpoints}: more than the {self.steps // 2} steps they are taken from"
            )

    def data(self) -> DatasetDict:
        """The pictures it is trained on, and those held out."""
        return coloured_digits(self.examples, without=self.without, seed=self.data_seed)

    @property
    def name(self) -> str:
        """Of its folder in the cache."""
        twin = "" if self.without is None else f"-without-{'-'.join(meaning(self.without))}"
        return f"coloured-digits-{self.family.replace('_', '-')}-{self.data_seed}-{self.seed}{twin}"


def text_to_image_model(recipe: TextToImageRecipe | None = None, *, progress: bool = True) -> Path:
    """Folder of a small text-to-image pipeline, trained on first use and kept in the cache.

    Args:
        recipe ([`TextToImageRecipe`], *optional*): what it is made of.
        progress (`bool`, defaults to `True`): say how long it takes.
    """
    recipe = recipe or TextToImageRecipe()
    return cache.cached(
        recipe.name, recipe, lambda folder: train(recipe, folder, progress=progress), progress=progress
    )


def train(recipe: TextToImageRecipe, folder: str | Path, *, progress: bool = True) -> Path:
    """Train VAE, text encoder and denoiser from nothing, one after the other, and save the pipeline with averaged weights; beside it, as
    `checkpoint-<step>/unet` (or `transformer`), denoisers of the run as they were.

    Args:
        recipe (`TextToImageRecipe`): everything.
        folder: gets the pipeline; complete or not there.
        progress (`bool`): say how long it takes.

    Returns:
        `Path`: `folder`.
    """
    folder = Path(folder)
    rows = recipe.data()["train"]
    images = pixels(rows["image"][:], (3, SIZE, SIZE), resize=False, argument="train", whole=False)
    with torch.random.fork_rng(devices=[]), cache.saved(recipe, folder) as scratch:
        torch.manual_seed(recipe.seed)
        family = FAMILIES[recipe.family](recipe.channels)
        train_vae(family, images, recipe, cache.Progress(f"{folder.name}'s VAE", recipe.vae_steps, quiet=not progress))
        latents = encoded(family.pipeline.vae, images)
        train_readers(family, rows["caption"][:], recipe)
        steps = cache.Progress(folder.name, recipe.steps, quiet=not progress)
        train_denoiser(family, latents, rows["caption"][:], recipe, scratch, steps)
        family.pipeline.save_pretrained(scratch)
    return folder


def train_vae(family: Family, images: Tensor, recipe: TextToImageRecipe, progress: cache.Progress) -> None:
    """Squared error and a light KL term (latent diffusion, arXiv 2112.10752); its latents are scaled to a deviation of 1."""
    vae = family.pipeline.vae.train()
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer, decay = _optimizer(vae.parameters(), VAE_LEARNING_RATE, recipe.vae_steps)
    for _ in range(recipe.vae_steps):
        batch = images[torch.randint(len(images), (BATCH,), generator=generator)]
        posterior = vae.encode(batch).latent_dist
        drawn = vae.decode(posterior.sample(generator)).sample
        loss = (drawn - batch).square().mean() + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        _step(loss, optimizer, decay)
        progress.step()
    vae.eval().requires_grad_(False)
    family.scale_latents(_means(vae, images[:1000]))


@torch.no_grad()
def _means(vae: Any, images: Tensor) -> Tensor:
    return torch.cat([vae.encode(part).latent_dist.mean for part in images.split(256)])


def encoded(vae: Any, images: Tensor) -> Tensor:
    """Means of the latents `[n, 4, 8, 8]`, as the denoiser sees them: there is no need for the VAE any more."""
    return (_means(vae, images) - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def train_readers(family: Family, captions: list[str], recipe: TextToImageRecipe) -> None:
    """Linear heads on the mean of all states tell which digit, colour and background a caption names, if it does. Text encoders of real pipelines have
    been trained before, too, and stay as they are; one that learned along with the denoiser would be told little of words whose pictures agree
    but for a shape.
    """
    choices = {kind: list(values) for kind, values in WORDS.items()}
    told = [read(caption) for caption in captions]
    named = {
        kind: torch.tensor([values.index(said[kind]) if kind in said else len(values) for said in told])
        for kind, values in choices.items()
    }
    width = family.read([""])["encoder_hidden_states"].shape[-1]
    heads = {kind: nn.Linear(width, len(values) + 1) for kind, values in choices.items()}
    generator = torch.Generator().manual_seed(recipe.seed)
    parameters = chain(*(part.parameters() for part in (*family.readers, *heads.values())))
    optimizer, decay = _optimizer(parameters, READER_LEARNING_RATE, recipe.reader_steps)
    for _ in range(recipe.reader_steps):
        chosen = torch.randint(len(captions), (READER_BATCH,), generator=generator)
        states = family.read([captions[row] for row in chosen])["encoder_hidden_states"].mean(1)
        losses = [nn.functional.cross_entropy(head(states), named[kind][chosen]) for kind, head in heads.items()]
        _step(sum(losses), optimizer, decay)
    for reader in family.readers:
        reader.eval().requires_grad_(False)


def train_denoiser(
    family: Family,
    latents: Tensor,
    captions: list[str],
    recipe: TextToImageRecipe,
    folder: Path,
    progress: cache.Progress,
) -> None:
    """Squared error of its guesses; every tenth caption is not said, for guidance."""
    denoiser = family.denoiser.train()
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer, decay = _optimizer(denoiser.parameters(), recipe.learning_rate, recipe.steps)
    average = EMAModel(denoiser.parameters(), decay=0.999)
    half = recipe.steps // 2
    kept = {recipe.steps - i * (recipe.steps - half) // recipe.checkpoints for i in range(recipe.checkpoints)}
    for step in range(1, recipe.steps + 1):
        chosen = torch.randint(len(latents), (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < DROPPED
        said = ["" if drop else captions[row] for row, drop in zip(chosen.tolist(), dropped.tolist(), strict=True)]
        with torch.no_grad():
            told = family.read(said)
        _step(family.loss(latents[chosen], told, generator), optimizer, decay)
        average.step(denoiser.parameters())
        if step in kept:
            denoiser.save_pretrained(folder / f"checkpoint-{step}" / family.name)
        progress.step()
    average.copy_to(denoiser.parameters())
    denoiser.eval()


def _optimizer(parameters: Any, rate: float, steps: int) -> tuple[torch.optim.AdamW, Any]:
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-4)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, max(2, steps), pct_start=0.1)


def _step(loss: Tensor, optimizer: torch.optim.Optimizer, decay: Any) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    decay.step()
