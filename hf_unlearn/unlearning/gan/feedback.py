"""Feedback on a GAN's samples: what is undesired, what is not, and what the marks say about samples nobody has seen."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...images import image_column, pixels
from .marks import FEWEST, spread_marks


if TYPE_CHECKING:
    from ...gan.pipeline import GANPipeline


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Feedback:
    """Images `[n, channels, size, size]` in [−1, 1].

    Args:
        negatives, positives (`Tensor`): marked: with what is undesired, and without.
        more_negatives, more_positives (`Tensor`): the original's own samples that the marks sort to either side; may be empty.
    """

    negatives: Tensor
    positives: Tensor
    more_negatives: Tensor
    more_positives: Tensor

    @property
    def all_negatives(self) -> Tensor:
        return torch.cat([self.negatives, self.more_negatives])

    @property
    def all_positives(self) -> Tensor:
        return torch.cat([self.positives, self.more_positives])


def samples_of(given: Any, pipeline: GANPipeline, *, resize: bool, argument: str) -> Tensor:
    """Marked samples as images.

    Args:
        given: images (PIL, or a tensor in [−1, 1]), rows that hold them, or a tensor of latents, which are drawn.
        argument (`str`): what to call it in an error.

    Raises:
        ValueError: nothing there, no image in it, or an image of another shape than the generator's.
    """
    if given is None or len(given) == 0:
        raise ValueError(f"{argument}: missing or empty; give at least one sample, or let marks= mark them")
    if isinstance(given, Tensor) and given.shape[1:] == pipeline.generator.latent_shape:
        return pipeline.draw(given)
    images = given if isinstance(given, Tensor) else [given[row] for row in range(len(given))]
    if isinstance(images[0], dict):
        column = image_column(images[0], argument)
        images = [row[column] for row in images]
    return pixels(images, pipeline.image_shape, resize=resize, argument=argument).detach().cpu()


def marked_by(marks: Callable[[Tensor], Tensor], samples: Tensor) -> Feedback:
    """Feedback of a callable on the original's samples.

    Raises:
        ValueError: it gives something else than a mark for each, or the same for all.
    """
    marked = torch.as_tensor(marks(samples)).cpu()
    if marked.shape != (len(samples),) or marked.dtype != torch.bool:
        raise ValueError(
            f"marks: gave {marked.dtype} of shape {tuple(marked.shape)} for {len(samples)} images; it must mark each with "
            "True (undesired) or False"
        )
    if marked.all() or not marked.any():
        kind = "positives: none" if marked.all() else "negatives: none"
        raise ValueError(f"{kind} among {len(samples)} samples that marks= was shown; raise mark_samples, or check it")
    return Feedback(samples[marked], samples[~marked], samples[:0], samples[:0])


def spread_over(
    feedback: Feedback, samples: Tensor, features: Callable[[Tensor], Tensor], *, miss_rate: float, seed: int
) -> Feedback:
    """The same feedback with the original's `samples` sorted by it; without, where there are too few marks."""
    count = min(len(feedback.negatives), len(feedback.positives))
    if count < FEWEST:
        logger.warning(
            "own_samples: %d marks of a kind are too few to sort the original's samples by; using the marked ones alone",
            count,
        )
        return feedback
    known = [features(images).flatten(1).numpy() for images in (feedback.negatives, feedback.positives, samples)]
    spread = spread_marks(*known, miss_rate=miss_rate, seed=seed)
    negative, positive = torch.from_numpy(spread.negative), torch.from_numpy(spread.positive)
    logger.info(
        "of %d own samples, %d are taken for positive and %d for negative; %.0f %% of the negative marks would pass",
        len(samples),
        positive.sum(),
        negative.sum(),
        100 * spread.missed,
    )
    return Feedback(feedback.negatives, feedback.positives, samples[negative], samples[positive])
