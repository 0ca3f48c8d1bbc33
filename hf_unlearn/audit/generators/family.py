"""Generators of images (diffusion models, text-to-image pipelines, GANs), as an audit knows them: what is asked for, their checks, and their cost."""

from __future__ import annotations

import time
from typing import Any

import torch

from ...hub.loading import diffusion_task
from ..check import Check, Role
from .data import GeneratorData, generator_data
from .denoising import denoising_loss, finetuned
from .disturbed import Bare, Guidance, NegativePrompts, Rounded, Samplers
from .drawn import AskedFor, Drawn, Paraphrased, Reordered
from .others import ClassDistance, NeighbourShift, OthersDistance
from .relearning import BATCH, RelearnForget, RelearnOthers, RelearnUnrelated
from .searched import FromPicture, LatentSearch, SeedSearch, WordSearch
from .subject import PARTS, GeneratorSubject, is_gan, pace


NAME = "generator"
MARKED = True  # it takes a marker, and how to draw
QUICK: tuple[type[Check], ...] = (
    Drawn, AskedFor, Paraphrased, Bare, SeedSearch, Guidance, NegativePrompts, Rounded, RelearnOthers, NeighbourShift, OthersDistance,
)  # fmt: skip
STANDARD: tuple[type[Check], ...] = (
    Drawn, AskedFor, Paraphrased, Reordered, Bare, SeedSearch, FromPicture, WordSearch, LatentSearch, Guidance, NegativePrompts, Samplers, Rounded,
    RelearnForget, RelearnOthers, RelearnUnrelated, ClassDistance, NeighbourShift, OthersDistance,
)  # fmt: skip
EVERY: tuple[type[Check], ...] = (*STANDARD,)
SEED = 0  # of the noise that losses are read with, whatever the audit's
GAN_TRAINING = 3  # looks at a draw that a step of training costs for each image: both players, forward and back


def fits(model: Any) -> bool:
    if not hasattr(model, "components") or not any(getattr(model, name, None) is not None for name in PARTS):
        return False
    return is_gan(model) or any(map(diffusion_task, _that_call(model)))


def subject(model: Any, role: Role, name: str) -> GeneratorSubject:
    return GeneratorSubject(model, role, name)


def check_alike(audited: GeneratorSubject, other: GeneratorSubject, argument: str) -> None:
    """Refuse a pipeline that is asked in another way, or draws from other noise.

    Raises:
        ValueError: naming the argument.
    """
    kinds = [type(one.model).__name__ for one in (audited, other)]
    if audited.is_prompted != other.is_prompted or audited.part != other.part:
        raise ValueError(f"{argument}: is a {kinds[1]}, the audited pipeline a {kinds[0]}; pass pipelines of one kind")
    sizes = [_size(one) for one in (audited, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{argument}: draws from noise of {sizes[1]}, the audited pipeline of {sizes[0]}; pass pipelines of one size"
        )


def data(
    audited: GeneratorSubject,
    forget: Any,
    retain: Any,
    test: Any,
    *,
    processing_class: Any,
    size: str,
    seed: int,
    original: GeneratorSubject | None = None,
    marker: Any = None,
    drawing: Any = None,
) -> GeneratorData:
    return generator_data(
        audited, original, forget, retain, test, marker=marker, drawing=drawing, size=size, seed=seed
    )


def forget_loss(one: GeneratorSubject, rows: GeneratorData) -> float | None:
    """The statistic of residual μ: the mean denoising loss of the images of the kind; of a GAN, which gives no likelihood, the mean squared distance
    of each of them from the nearest of its draws. None without images, or where the loss cannot be read.
    """
    if not len(rows.forget):
        return None
    if is_gan(one.model):
        drawn, wanted = (images.flatten(1) for images in (one.draw(rows.unprompted, rows.drawing), rows.forget.pixels))
        return float(torch.cdist(wanted, drawn).square().amin(1).mean() / wanted.shape[1])
    if "training" in rows.lacks:
        return None
    return denoising_loss(one.pipe, rows.forget, rows.drawing, SEED)


def cost(one: GeneratorSubject, rows: GeneratorData) -> tuple[float, float]:
    """Seconds of an image drawn, and of one that is trained on."""
    drawn = pace(one, rows)
    images = rows.forget if len(rows.forget) else rows.retain
    if is_gan(one.model) or "training" in rows.lacks or not len(images):
        return drawn, GAN_TRAINING * drawn
    few = images.select(torch.arange(len(images))[:BATCH])
    device = one.model.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws from the global one
        steps = finetuned(one.copy(), few, lambda step: torch.arange(len(few)), (1, 2), rows.drawing, SEED)
        next(steps)  # the first one takes longer
        started = time.perf_counter()
        next(steps)
    return drawn, (time.perf_counter() - started) / len(few)


def _that_call(model: Any) -> list[type]:
    """Its class, and those that it derives from, which draw in a way of their own."""
    return [kind for kind in type(model).__mro__ if "__call__" in vars(kind)]


def _size(one: GeneratorSubject) -> Any:
    part = getattr(one.model, one.part)
    return (
        part.latent_shape
        if is_gan(one.model)
        else (part.config.in_channels, getattr(part.config, "sample_size", None))
    )
