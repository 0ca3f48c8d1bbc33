"""What pictures of coloured digits show, as a small classifier sees it, and how far a pipeline follows its prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification

from ..images import pixels
from ..unlearning.diffusion.drawing import generate
from . import cache
from .captions import WORDS, read
from .coloured_digits import SIZE, coloured_digits


if TYPE_CHECKING:
    from datasets import Dataset
    from diffusers import DiffusionPipeline


SIZES = [len(values) for values in WORDS.values()]
BATCH, NOISE = 128, 0.1  # pictures at a time; the deviation of what they are disturbed by, in [−1, 1]


@dataclass(frozen=True)
class AttributeRecipe:
    """What a classifier of coloured digits depends on.

    Attributes:
        examples (`int`, defaults to 6000): pictures, see [`coloured_digits`]. Not the seed of the generators' pictures by default, though
            the handwriting is the same.
        steps (`int`, defaults to 600): of AdamW on batches of 128.
        data_seed (`int`, defaults to 1): of the pictures.
        seed (`int`, defaults to 0): of weights and order.
    """

    examples: int = 6_000
    steps: int = 600
    data_seed: int = 1
    seed: int = 0


class AttributeClassifier:
    """Digit, colour and background of pictures: one ResNet with a head for each, as one row of 10 + 6 + 4 logits. It sees
    colours and [`with_ink`].

    Args:
        model (`ResNetForImageClassification`): of these logits.
    """

    def __init__(self, model: ResNetForImageClassification):
        self.model = model.eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> AttributeClassifier:
        return cls(ResNetForImageClassification.from_pretrained(folder))

    @torch.no_grad()
    def __call__(self, images: Tensor, *, batch_size: int = 256) -> dict[str, list[str]]:
        """Values by attribute, as in `{"digit": ["3", …], "colour": ["red", …], "background": …}`.

        Args:
            images (`Tensor`): `[n, 3, 16, 16]` in [−1, 1].
        """
        logits = torch.cat([self.model(with_ink(part)).logits for part in images.split(batch_size)])
        return {
            kind: [list(values)[place] for place in head.argmax(1).tolist()]
            for (kind, values), head in zip(WORDS.items(), logits.split(SIZES, 1), strict=True)
        }


def attribute_classifier(recipe: AttributeRecipe | None = None, *, progress: bool = True) -> AttributeClassifier:
    """A classifier, trained on first use (seconds) and kept in the cache."""
    recipe = recipe or AttributeRecipe()
    name = f"coloured-digits-attributes-{recipe.data_seed}-{recipe.seed}"
    folder = cache.cached(name, recipe, lambda path: train(recipe, path, progress=progress), progress=progress)
    return AttributeClassifier.from_pretrained(folder)


def train(recipe: AttributeRecipe, folder: str | Path, *, progress: bool = True) -> Path:
    """Train on pictures of [`coloured_digits`], disturbed by noise and contrast as drawn ones may be, and save the ResNet."""
    folder = Path(folder)
    images, labels = labelled(coloured_digits(recipe.examples, seed=recipe.data_seed)["train"])
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]), cache.saved(recipe, folder) as scratch:
        torch.manual_seed(recipe.seed)
        model = _untrained().train()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, recipe.steps)
        told = cache.Progress(folder.name, recipe.steps, quiet=not progress)
        for _ in range(recipe.steps):
            rows = torch.randint(len(images), (BATCH,), generator=generator)
            contrast = 1 + 0.3 * torch.rand(BATCH, 1, 1, 1, generator=generator)
            noise = NOISE * torch.rand(BATCH, 1, 1, 1, generator=generator)
            seen = images[rows] * contrast + noise * torch.randn(images[rows].shape, generator=generator)
            heads = model(with_ink(seen.clamp(-1, 1))).logits.split(SIZES, 1)
            losses = [F.cross_entropy(head, label) for head, label in zip(heads, labels[rows].T, strict=True)]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
            decay.step()
            told.step()
        model.eval().save_pretrained(scratch)
    return folder


def labelled(rows: Dataset) -> tuple[Tensor, Tensor]:
    """Pictures `[n, 3, 16, 16]` in [−1, 1] and labels `[n, 3]`, in the order of [`WORDS`]."""
    images = pixels(rows["image"][:], (3, SIZE, SIZE), resize=False, argument="rows", whole=False)
    return images, torch.tensor([rows[kind][:] for kind in WORDS]).T


def with_ink(images: Tensor) -> Tensor:
    """A fourth channel, from −1 where a pixel is as the picture's edge to 1 where it is furthest from it: the digit whatever the colours,
    without which it takes long to be learnt.

    Args:
        images (`Tensor`): `[n, 3, height, width]`.
    """
    edge = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], 2).median(2).values
    away = (images - edge[:, :, None, None]).norm(dim=1, keepdim=True)
    return torch.cat([images, away / away.amax((2, 3), keepdim=True).clamp(min=1e-6) * 2 - 1], 1)


def _untrained() -> ResNetForImageClassification:
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=4,
            embedding_size=32,
            hidden_sizes=[32, 64],
            depths=[1, 1],
            layer_type="basic",
            num_labels=sum(SIZES),
        )
    )


def shown_as_wanted(found: Mapping[str, Sequence[str]], wanted: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Share of pictures that show what was wanted: by attribute, of those of which it was wanted, and `all` of it.

    Args:
        found: values by attribute, as [`AttributeClassifier`] gives them.
        wanted: for each picture the values by attribute; what it leaves out is not judged.

    Raises:
        ValueError: another number of pictures than of wishes, or none.
    """
    numbers = {len(values) for values in found.values()}
    if numbers != {len(wanted)} or not wanted:
        raise ValueError(f"wanted: has {len(wanted)} entries for {max(numbers, default=0)} pictures")
    right = [{kind: found[kind][row] == value for kind, value in wish.items()} for row, wish in enumerate(wanted)]
    shares: dict[str, Any] = {}
    for kind in found:
        judged = [row[kind] for row in right if kind in row]
        if judged:
            shares[kind] = sum(judged) / len(judged)
    return shares | {"all": sum(all(row.values()) for row in right) / len(right)}


def followed(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    wanted: Sequence[Mapping[str, str]] | None = None,
    *,
    classifier: AttributeClassifier | None = None,
    seed: int = 0,
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
) -> dict[str, float]:
    """Share of drawn pictures that show what was asked for, as [`shown_as_wanted`].

    Args:
        pipeline (`DiffusionPipeline`): with a U-Net, as [`generate`] takes it; draws 16 × 16 pictures of prompts.
        prompts (`Sequence[str]`): one picture each.
        wanted (*optional*): what each should show. Default: what the prompt says.
        classifier ([`AttributeClassifier`], *optional*): default [`attribute_classifier`].
        seed (`int`, defaults to 0): of the noise that the pictures begin as.
        num_inference_steps (`int`, defaults to 20): of the sampler.
        guidance_scale (`float`, defaults to 7.5): of classifier-free guidance.
    """
    classifier = classifier or attribute_classifier()
    images = generate(
        pipeline,
        prompts,
        seed=seed,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    )
    return shown_as_wanted(classifier(images), [read(prompt) for prompt in prompts] if wanted is None else wanted)
