"""The job of `hf-unlearn unlearn --method adapt_then_unlearn`: a GAN forgets what was marked in its own samples."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import data
from ..examples.named import GANS
from ..files import PRIVATE
from ..gan.players import as_pipeline
from ..metrics.features import ClassifierFeatures
from ..modes import seeded_generator
from ..training.checks import check_processes
from ..unlearning.gan.adapt_then_unlearn import MARK_SEED, AdaptThenUnlearnConfig, AdaptThenUnlearnTrainer
from .alone import made_once
from .judging import Judge, classifier_of, forget_and_report, reference_of
from .keys import card_of_dataset, console
from .marking import (
    class_numbers,
    other_real_images,
    saved_dataset,
    where_the_sheet_is,
    write_sheet,
)


if TYPE_CHECKING:
    from ..gan.pipeline import GANPipeline
    from .recipe.adapt_then_unlearn import GANJob


logger = logging.getLogger(__name__)

MARKER_SEED = 1  # of the classifier of digits that marks; the one that judges has 0


def run_adapt_then_unlearn(
    job: GANJob, config: AdaptThenUnlearnConfig, trainer_class: type[AdaptThenUnlearnTrainer]
) -> dict[str, Any] | None:
    """Mark, draw, train, draw again, save, and say where things are; or write the sheet to mark, where no marks are given.

    Raises:
        ValueError: something in the recipe does not fit the model or the data; no model was written.
        FloatingPointError: a loss is not finite.
    """
    check_processes(config)
    # What costs seconds to find wrong comes before what costs minutes to train.
    marker = None if job.marker is None else classifier_of(job.marker, config, argument="marker", seed=MARKER_SEED)
    classifier = None if job.classifier is None else classifier_of(job.classifier, config)
    to_mark = None if marker is None else _classes(job, marker, "marker")
    forgotten = [] if classifier is None else _classes(job, classifier, "classifier")
    others = None
    if job.eval_split is not None:
        others = other_real_images(job.dataset, job.dataset_revision, job.eval_split, forgotten)
    marked = {}
    if job.undesired_folder is not None:
        marked = {
            name: saved_dataset(getattr(job, f"{name}_folder"), f"{name}_folder") for name in ("undesired", "clean")
        }
    if job.marker is not None and job.marker == job.classifier != "digits":
        logger.warning("classifier: is the one that marks too, so its figures flatter; take another one to count")

    pipeline, _ = as_pipeline(made_once(config, job.model) if job.model in GANS else job.model)
    judge = None
    if classifier is not None:
        reference = reference_of(others, classifier, pipeline.image_shape, resize=config.resize)
        judge = Judge(classifier, job.measure_samples, forgotten, reference, job.eval_split, coverage=True)
    if marker is not None and job.marks is None:
        marked["marker"] = lambda images: torch.isin(marker.classify(images), torch.tensor(to_mark))
    elif marker is not None:
        marked = _until_marked(job, config, pipeline, marker, to_mark)
    elif not marked:
        samples = _draw(pipeline, config, job.looked_at)
        if job.undesired is None:
            if config.should_save:
                return {"sheets": _write_sheet(samples, Path(config.output_dir, PRIVATE))}
            return None
        shows = torch.zeros(len(samples), dtype=torch.bool).index_fill(0, torch.tensor(job.undesired), True)
        marked = {"undesired": samples[shows], "clean": samples[~shows]}

    trainer = trainer_class(pipeline, config, **marked)
    trainer.card_values = card_of_dataset(job.dataset)
    if marker is not None:
        kind = data.in_words([marker.model.config.id2label[label] for label in to_mark])
        trainer.card_values |= {"forgotten": f"{kind}: {trainer._forgotten()}"}
    if trainer.is_world_process_zero():
        counts = (len(trainer.feedback.undesired), len(trainer.feedback.clean))
        console().print("marks    {:,} undesired, {:,} clean".format(*counts))
    return forget_and_report(trainer, judge)


# Feedback


def _draw(pipeline: GANPipeline, config: AdaptThenUnlearnConfig, count: int, first: int = 0) -> Tensor:
    """Samples `first` to `first + count` of a row that model and seed alone decide, whatever is asked for at a time."""
    shape = pipeline.generator.latent_shape
    latents = [
        torch.randn(shape, generator=seeded_generator("cpu", config.seed, MARK_SEED, number))
        for number in range(first, first + count)
    ]
    return pipeline.to(config.device).draw(torch.stack(latents), batch_size=config.batch_size)


def _write_sheet(samples: Tensor, folder: Path) -> list[Path]:
    pages = write_sheet(samples, folder)
    console().print(
        f"{where_the_sheet_is(pages, len(samples))}: set undesired to the numbers of those that show what is to be "
        "forgotten, and run again",
        markup=False,
    )
    return pages


def _until_marked(
    job: GANJob, config: AdaptThenUnlearnConfig, pipeline: GANPipeline, marker: ClassifierFeatures, to_mark: list[int]
) -> dict[str, Tensor]:
    """Looks at samples one after another until `marks` of them are negative, at `mark_samples` at most."""
    samples, shows, found = [], [], 0
    for first in range(0, config.mark_samples, config.batch_size):
        samples.append(_draw(pipeline, config, min(config.batch_size, config.mark_samples - first), first))
        shows.append(torch.isin(marker.classify(samples[-1]), torch.tensor(to_mark)))
        found += int(shows[-1].sum())
        if found >= job.marks:
            break
    images, undesired = torch.cat(samples), torch.cat(shows)
    if found < job.marks:
        raise ValueError(
            f"marks: {job.marks} are wanted, and marker={job.marker!r} sees classes in {found} of "
            f"{len(images)} samples; set a smaller number, or raise mark_samples"
        )
    looked_at = int(undesired.nonzero()[job.marks - 1]) + 1
    images, undesired = images[:looked_at], undesired[:looked_at]
    if undesired.all():
        raise ValueError(
            f"classes: marker={job.marker!r} sees them in all of {looked_at} samples, none is left as positive; "
            "set fewer, or raise marks"
        )
    return {"undesired": images[undesired], "clean": images[~undesired]}


def _classes(job: GANJob, classifier: ClassifierFeatures, argument: str) -> list[int]:
    """`classes` as a classifier numbers them."""
    name = getattr(job, argument)
    return class_numbers(job.classes, classifier, key="classes", argument=argument, name=name)
