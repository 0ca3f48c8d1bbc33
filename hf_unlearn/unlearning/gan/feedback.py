"""Feedback on a GAN's samples: what is undesired, what is not, and what the marks say about samples nobody has seen."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.svm import SVC
from torch import Tensor

from ...data import check_marks
from ...images import check_signed, image_column, pixels


if TYPE_CHECKING:
    from ...gan.pipeline import GANPipeline


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Feedback:
    """Images `[n, channels, size, size]` in [−1, 1].

    Args:
        undesired, clean (`Tensor`): marked: with what is undesired, and without.
        more_undesired, more_clean (`Tensor`): the original's own samples that the marks sort to either side; may be empty.
    """

    undesired: Tensor
    clean: Tensor
    more_undesired: Tensor
    more_clean: Tensor

    @property
    def all_undesired(self) -> Tensor:
        return torch.cat([self.undesired, self.more_undesired])

    @property
    def all_clean(self) -> Tensor:
        return torch.cat([self.clean, self.more_clean])


def samples_of(given: Any, pipeline: GANPipeline, *, resize: bool, argument: str) -> Tensor:
    """Marked samples as images.

    Args:
        given: images (PIL, or a tensor in [−1, 1]), rows that hold them, or a tensor of latents, which are drawn.
        argument (`str`): what to call it in an error.

    Raises:
        ValueError: nothing there, no image in it, an image of another shape than the generator's, or numbers that are not finite.
    """
    if given is None or len(given) == 0:
        raise ValueError(f"{argument}: missing or empty; give at least one sample, or let marker= mark them")
    if isinstance(given, Tensor) and given.shape[1:] == pipeline.generator.latent_shape:
        if not given.isfinite().all():
            row = (~given.flatten(1).isfinite().all(1)).nonzero()[0].item()
            raise ValueError(f"{argument}: latent {row} holds NaN or infinite numbers; remove it")
        return pipeline.draw(given)
    images = given if isinstance(given, Tensor) else [given[row] for row in range(len(given))]
    if isinstance(images[0], dict):
        column = image_column(images[0], argument)
        images = [row[column] for row in images]
    # A few marked samples may well be bright, all of them.
    return pixels(images, pipeline.image_shape, resize=resize, argument=argument, whole=False).detach().cpu()


def marked_samples(undesired: Any, clean: Any, pipeline: GANPipeline, *, resize: bool) -> tuple[Tensor, Tensor]:
    """Both kinds of marked samples as images, in whatever form [`samples_of`] takes each.

    Raises:
        ValueError: as there, samples that are in [0, 1] by all appearance, or one that is marked both ways.
    """
    marked = tuple(
        samples_of(given, pipeline, resize=resize, argument=argument)
        for argument, given in (("undesired", undesired), ("clean", clean))
    )
    check_signed(*torch.cat(marked).aminmax(), "undesired, clean")
    # In 256 levels: the same image may come as a picture and as a tensor. And latents as they are: what is drawn of them
    # depends in the last digits on what is drawn beside it.
    for kinds in ((undesired, clean), [((images + 1) * 127.5).round().byte() for images in marked]):
        if all(isinstance(kind, Tensor) for kind in kinds):
            check_marks(*(kind.detach().cpu().float().numpy() for kind in kinds))
    return marked


def marked_by(marker: Callable[[Tensor], Tensor], samples: Tensor) -> Feedback:
    """Feedback of a callable on the original's samples.

    Raises:
        ValueError: it gives something else than a mark for each, or the same for all.
    """
    marked = torch.as_tensor(marker(samples)).cpu()
    if marked.shape != (len(samples),) or marked.dtype != torch.bool:
        raise ValueError(
            f"marker: gave {marked.dtype} of shape {tuple(marked.shape)} for {len(samples)} images; it must mark each with "
            "True (undesired) or False"
        )
    if marked.all() or not marked.any():
        kind = "clean: none" if marked.all() else "undesired: none"
        raise ValueError(
            f"{kind} among {len(samples)} samples that marker= was shown; raise mark_samples, or check it"
        )
    return Feedback(samples[marked], samples[~marked], samples[:0], samples[:0])


def spread_over(
    feedback: Feedback, samples: Tensor, features: Callable[[Tensor], Tensor], *, miss_rate: float, seed: int
) -> Feedback:
    """The same feedback with the original's `samples` sorted by it; without, where there are too few marks."""
    count = min(len(feedback.undesired), len(feedback.clean))
    if count < FEWEST:
        logger.warning(
            "own_samples: %d marks of a kind are too few to sort the original's samples by; using the marked ones alone",
            count,
        )
        return feedback
    known = [features(images).flatten(1).numpy() for images in (feedback.undesired, feedback.clean, samples)]
    spread = spread_marks(*known, miss_rate=miss_rate, seed=seed)
    negative, positive = torch.from_numpy(spread.negative), torch.from_numpy(spread.positive)
    logger.info(
        "of %d own samples, %d are taken for positive and %d for negative; %.0f %% of the negative marks would pass",
        len(samples),
        positive.sum(),
        negative.sum(),
        100 * spread.missed,
    )
    return Feedback(feedback.undesired, feedback.clean, samples[negative], samples[positive])


FOLDS = 10


FEWEST = 5  # marks of either kind below which nothing is said about other samples


@dataclass(frozen=True)
class SpreadMarks:
    """What [`spread_marks`] says of samples that nobody has looked at.

    Args:
        negative (array of `bool`): `[n]`, shows what is undesired, with a margin.
        positive (array of `bool`): `[n]`, does not, with a margin; what is neither is in doubt.
        low, high (`float`): ≤ 0 and ≥ 0: scores below `low` are positive, those of `high` and above negative.
        missed (`float`): share of the negative marks that would pass for positive, each scored by a classifier that has not
            seen it: what was asked for, or less.
    """

    negative: np.ndarray
    positive: np.ndarray
    low: float
    high: float
    missed: float


def spread_marks(
    undesired: np.ndarray, clean: np.ndarray, others: np.ndarray, *, miss_rate: float = 0.05, seed: int = 0
) -> SpreadMarks:
    """Sort samples by what a few marked ones teach a support-vector classifier with a Gaussian kernel.

    How far from the boundary a sample must be is set by the marks themselves, each scored by a classifier that has not seen
    it: of the negative marks at most a share of `miss_rate` may count as positive, and among what counts as negative at most
    about that share may be positive.

    Args:
        undesired, clean, others (array): features `[m, d]`, `[k, d]`, `[n, d]`.
        miss_rate (`float`, defaults to 0.05): in (0, 1). With few marks more will pass than it says.
        seed (`int`): of the folds.

    Raises:
        ValueError: fewer than five marks of a kind, or a rate that is none.
    """
    if min(len(undesired), len(clean)) < FEWEST:
        raise ValueError(
            f"undesired, clean: {len(undesired)} and {len(clean)} marks are too few to sort other samples by; "
            f"mark {FEWEST} of each at least"
        )
    if not 0 < miss_rate < 1:
        raise ValueError(f"miss_rate={miss_rate}: must be in (0, 1)")
    marked = np.concatenate([undesired, clean]).astype(np.float64)
    shows = np.arange(len(marked)) < len(undesired)
    centre = marked.mean(0)
    scale = (marked - centre).std() or 1.0
    marked = (marked - centre) / scale
    classifier = SVC(C=10.0, gamma=1 / marked.shape[1], class_weight="balanced")
    folds = StratifiedKFold(min(FOLDS, len(undesired), len(clean)), shuffle=True, random_state=seed)
    unseen = cross_val_predict(classifier, marked, shows, cv=folds, method="decision_function")
    allowed = int(miss_rate * len(undesired))  # marks of either kind that may fall on the wrong side
    low = min(0.0, float(np.sort(unseen[shows])[allowed]))
    wrong = np.sort(unseen[~shows])[::-1]
    high = max(0.0, float(np.nextafter(wrong[allowed], np.inf))) if allowed < len(wrong) else 0.0
    scores = classifier.fit(marked, shows).decision_function((others - centre) / scale)
    return SpreadMarks(scores >= high, scores < low, low, high, float((unseen[shows] < low).mean()))
