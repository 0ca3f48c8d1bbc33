"""FILTER: a generator that nobody retrains; what it must not show is held back as it draws."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_unlearn import FASTFitter, FASTResult, FilteredPipeline, GANPipeline
from hf_unlearn.examples import gan
from hf_unlearn.examples.generators import images_of
from hf_unlearn.metrics.features import ClassifierFeatures

from .stage import Stage


STEPS = 1_500  # a fifth of the GAN that recipes use: its digits can be told apart
LOOKED_AT, UNMARKED, FRESH, SHOWN = 600, 3_000, 2_000, 40


@dataclass(frozen=True)
class Filtered:
    """What this act leaves.

    Args:
        pipeline ([`FilteredPipeline`]): the generator with its filter.
        latents (`Tensor`): of the samples that are shown, `[40, 64]`.
        before, after (`list[PIL.Image]`): drawn from them without and with the filter.
        blocked, undesired (`list[bool]`): of each of them: whether it is held back, and whether it shows the digit.
        marks (`int`): samples that were marked as undesired, of those that were looked at.
        promise (`str`): of the filter.
        share_before, share_after (`float`): of the digit among fresh samples, and among those that are released.
        false_alarms (`float`): share of the other samples that is held back.
        fresh (`int`): samples that these three shares are of.
    """

    pipeline: FilteredPipeline
    latents: Tensor
    before: list[Any]
    after: list[Any]
    blocked: list[bool]
    undesired: list[bool]
    marks: int
    promise: str
    share_before: float
    share_after: float
    false_alarms: float
    fresh: int


def play(stage: Stage, encoder: str, looks: str) -> Filtered:
    """Train a small GAN, mark a few of its samples, and put a filter around it.

    Args:
        encoder (`str`): folder of the classifier through whose features the filter sees.
        looks (`str`): folder of another one, which plays the person who looks at samples and marks them.
    """
    pipeline = small_gan(stage)
    person = ClassifierFeatures.from_pretrained(looks)

    def shows(images: Tensor) -> Tensor:
        return person.classify(images) == stage.forgotten

    generator = torch.Generator().manual_seed(stage.seed)
    samples = pipeline.draw(pipeline.prepare_latents(LOOKED_AT, generator))
    marked = shows(samples)
    stage.say(f"a classifier looks at {LOOKED_AT} samples and marks {marked.sum()} of them as a {stage.forgotten}")
    more = pipeline.draw(pipeline.prepare_latents(UNMARKED, generator))  # nobody looks at these
    result = fitted(stage, encoder, samples[marked], samples[~marked], more)
    filtered = FilteredPipeline(pipeline, result.checker())
    latents = pipeline.prepare_latents(FRESH, generator)
    blocked = torch.tensor(filtered(latents=latents).filtered)
    undesired = shows(pipeline.draw(latents))
    act = Filtered(
        pipeline=filtered,
        latents=latents[:SHOWN],
        before=pipeline(latents=latents[:SHOWN]).images,
        after=filtered(latents=latents[:SHOWN]).images,
        blocked=blocked[:SHOWN].tolist(),
        undesired=undesired[:SHOWN].tolist(),
        marks=int(marked.sum()),
        promise=result[str(stage.forgotten)].threshold.promise,
        share_before=undesired.float().mean().item(),
        share_after=undesired[~blocked].float().mean().item(),
        false_alarms=blocked[~undesired].float().mean().item(),
        fresh=FRESH,
    )
    stage.say(f"the filter promises: {act.promise}")
    stage.say(
        f"of {FRESH:,} fresh samples {100 * act.share_before:.1f} % show a {stage.forgotten}, of those released {100 * act.share_after:.1f} %; "
        f"{100 * act.false_alarms:.1f} % of the others are held back"
    )
    return act


def fitted(stage: Stage, encoder: str, undesired: Tensor, clean: Tensor, unmarked: Tensor) -> FASTResult:
    """A filter of marks. Its threshold lies where it keeps its promise."""
    fitter = FASTFitter(encoder, concepts={str(stage.forgotten): f"the handwritten digit {stage.forgotten}"})
    fitter.update(undesired=undesired, clean=clean)
    fitter.update(unmarked=unmarked)
    return fitter.fit()


def small_gan(stage: Stage) -> GANPipeline:
    """A DCGAN of 8 × 8 images."""
    recipe = replace(gan.DIGITS, steps=STEPS, seed=stage.seed)
    stage.say(f"training a small GAN that draws digits, {STEPS:,} steps")
    return GANPipeline.from_pretrained(gan.train(recipe, images_of(recipe), stage.folder / "gan"))
