"""The job of `hf-unlearn unlearn --method adapt_then_unlearn`: a GAN forgets what was marked in its own samples."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..examples.named import GANS
from ..gan.players import as_pipeline
from ..metrics.features import ClassifierFeatures
from ..modes import seeded_generator
from ..training.checks import check_fields, check_is_not_original, check_processes
from ..unlearning.gan.adapt_then_unlearn import MARK_SEED, AdaptThenUnlearnConfig, AdaptThenUnlearnTrainer
from .alone import made_once
from .judging import Judge, classifier_of, forget_and_report, reference_of
from .keys import card_of_dataset, check_needs, console
from .marking import (
    check_numbers,
    class_numbers,
    other_real_images,
    saved_dataset,
    where_the_sheet_is,
    write_sheet,
)


if TYPE_CHECKING:
    from ..gan.pipeline import GANPipeline


logger = logging.getLogger(__name__)

METHODS = {"adapt_then_unlearn": (AdaptThenUnlearnConfig, AdaptThenUnlearnTrainer)}
MARKER_SEED = 1  # of the classifier of digits that marks; the one that judges has 0


@dataclass
class GANJob:
    """Which GAN forgets what: the keys of a recipe with `method: adapt_then_unlearn` besides those of
    [`AdaptThenUnlearnConfig`].

    What is forgotten is said by marks on samples: by a classifier that plays the user (`marker` with `classes`), by
    two sets of images (`undesired_folder` and `clean_folder`), or by numbers on a sheet of samples (`undesired`). With none of the three
    the job writes that sheet and ends.

    Args:
        method (`"adapt_then_unlearn"`): the trainer.
        preset (`"paper"`, *optional*): the paper's objective alone; keys that are given win.
        model (`str`): `"digits-gan"` or `"fashion-mnist-gan"` (small GANs, trained on first use: minutes), the folder or the
            id of a [`GANPipeline`].
        marker (`str`, *optional*): `"digits"`, a folder or an id of an image classifier, which marks the samples that it sees
            one of `classes` in. Not the classifier that counts, or the figures flatter.
        classes (`list[str]`, *optional*): names or numbers of classes, for `marker` and for `classifier`.
        marks (`int`, *optional*, defaults to 100): undesired marks: samples are looked at one after another until there are so
            many, and all others looked at are clean. `None`: all `mark_samples` samples are looked at.
        undesired_folder, clean_folder (`str`, *optional*): folders of datasets written by `save_to_disk`, with a column of images: with
            what is to be forgotten, and without.
        undesired (`list[int]`, *optional*): numbers on the sheet of the samples that show it; all others there are clean.
        looked_at (`int`, defaults to 200): samples on the sheet. Which ones they are is decided by model and seed.
        classifier (`str`, *optional*): counts what is drawn before and after: `"digits"`, a folder or an id.
        measure_samples (`int`, defaults to 500): images drawn before and after for it.
        dataset, eval_split (`str`, *optional*): real images, and the split of them: those of the other classes are the
            reference of the Fréchet distance and of coverage. Their labels are the classifier's numbers.
        dataset_revision (`str`, *optional*): of a dataset on the Hub.

    Raises:
        ValueError: a key that is missing, or two that exclude each other.
    """

    _argument_group_name = "model, feedback and measuring"
    _methods = METHODS

    method: Literal["adapt_then_unlearn"] | None = None
    preset: Literal["paper"] | None = None
    model: str | None = None
    marker: str | None = None
    classes: list[str] | None = None
    marks: int | None = 100
    undesired_folder: str | None = None
    clean_folder: str | None = None
    undesired: list[int] | None = None
    looked_at: int = 200
    classifier: str | None = None
    measure_samples: int = 500
    dataset: str | None = None
    dataset_revision: str | None = None
    eval_split: str | None = None

    def __post_init__(self):
        if self.method not in self._methods:
            raise ValueError(f"method: {self.method!r} is not one of {', '.join(self._methods)}")
        if not self.model:
            raise ValueError(f"model: missing; set it to {', '.join(map(repr, GANS))}, a folder, or an id on the Hub")
        check_fields(self, {"≥ 1": ("marks",), "≥ 2": ("measure_samples",)})
        self._check_feedback()
        self._check_measuring()

    def _check_feedback(self) -> None:
        given = [
            name
            for name in ("marker", "undesired_folder", "clean_folder", "undesired")
            if getattr(self, name) is not None
        ]
        for name, other in (("undesired_folder", "clean_folder"), ("clean_folder", "undesired_folder")):
            if given == [name]:
                raise ValueError(f"{other}: missing, which {name} needs; set it to a folder written by save_to_disk")
        if len(given) > 1 and given != ["undesired_folder", "clean_folder"]:
            raise ValueError(f"{given[-1]}: given beside {given[0]}; keep one of them")
        if self.marker is not None and not self.classes:
            raise ValueError("classes: missing; list the classes that marker is to mark, as in [3]")
        check_numbers(self.undesired, self.looked_at, others="clean")

    def _check_measuring(self) -> None:
        if self.classes and not (self.marker or self.classifier):
            raise ValueError(
                "classifier: missing, which classes needs; set it, or marker, to 'digits', a folder, or an id"
            )
        check_needs(
            self,
            ("dataset_revision", "dataset", "an id on the Hub"),
            ("eval_split", "dataset", "'digits', a folder, or an id"),
            ("dataset", "eval_split", "the split to compare with, as in test"),
            ("eval_split", "classifier", "'digits', a folder, or an id"),
            ("eval_split", "classes", "the classes that are not to be compared with, as in [3]"),
        )

    def config(self, config_class: type[AdaptThenUnlearnConfig], given: dict[str, Any]) -> AdaptThenUnlearnConfig:
        """The method's config with the keys that were given.

        Raises:
            ValueError: a key that is missing or a value that is not allowed.
        """
        if not given.get("output_dir"):
            raise ValueError("output_dir: missing; set it to the folder that gets the unlearned model")
        check_is_not_original(given["output_dir"], self.model)
        return (config_class if self.preset is None else config_class.paper)(**given)


def run_adapt_then_unlearn(
    job: GANJob, config: AdaptThenUnlearnConfig, trainer_class: type[AdaptThenUnlearnTrainer]
) -> None:
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
                _write_sheet(samples, Path(config.output_dir, "_private"))
            return
        shows = torch.zeros(len(samples), dtype=torch.bool).index_fill(0, torch.tensor(job.undesired), True)
        marked = {"undesired": samples[shows], "clean": samples[~shows]}

    trainer = trainer_class(pipeline, config, **marked)
    trainer.card_values = card_of_dataset(job.dataset)
    if marker is not None:
        names = [str(marker.model.config.id2label[label]) for label in to_mark]
        kind = ("class " if len(names) == 1 else "classes ") + ", ".join(names)
        trainer.card_values |= {"forgotten": f"{kind}: {trainer._forgotten()}"}
    if trainer.is_world_process_zero():
        counts = (len(trainer.feedback.undesired), len(trainer.feedback.clean))
        console().print("marks    {:,} undesired, {:,} clean".format(*counts))
    forget_and_report(trainer, judge)


# Feedback


def _draw(pipeline: GANPipeline, config: AdaptThenUnlearnConfig, count: int, first: int = 0) -> Tensor:
    """Samples `first` to `first + count` of a row that model and seed alone decide, whatever is asked for at a time."""
    shape = pipeline.generator.latent_shape
    latents = [
        torch.randn(shape, generator=seeded_generator("cpu", config.seed, MARK_SEED, number))
        for number in range(first, first + count)
    ]
    return pipeline.to(config.device).draw(torch.stack(latents), batch_size=config.batch_size)


def _write_sheet(samples: Tensor, folder: Path) -> None:
    pages = write_sheet(samples, folder)
    console().print(
        f"{where_the_sheet_is(pages, len(samples))}: set undesired to the numbers of those that show what is to be "
        "forgotten, and run again",
        markup=False,
    )


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
