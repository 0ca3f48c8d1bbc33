"""The job of `hf-unlearn unlearn --method adapt_then_unlearn`: a GAN forgets what was marked in its own samples."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from ..examples import gan as small_gan
from ..gan.players import as_pipeline
from ..metrics.features import ClassifierFeatures
from ..modes import seeded_generator
from ..training.checks import check_processes
from ..unlearning.gan.adapt_then_unlearn import MARK_SEED, AdaptThenUnlearnConfig, AdaptThenUnlearnTrainer
from .alone import made_once
from .judging import Judge, classifier_of, forget_and_report, reference_of
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

    What is forgotten is said by marks on samples: by a classifier that plays the user (`marker` with `forget_classes`), by
    two sets of images (`negatives` and `positives`), or by numbers on a sheet of samples (`undesired`). With none of the three
    the job writes that sheet and ends.

    Args:
        method (`"adapt_then_unlearn"`): the trainer.
        preset (`"paper"`, *optional*): the paper's objective alone; keys that are given win.
        model (`str`): `"digits-gan"` or `"fashion-mnist-gan"` (small GANs, trained on first use: minutes), the folder or the
            id of a [`GANPipeline`].
        marker (`str`, *optional*): `"digits"`, a folder or an id of an image classifier, which marks the samples that it sees
            one of `forget_classes` in. Not the classifier that counts, or the figures flatter.
        forget_classes (`list[str]`, *optional*): names or numbers of classes, for `marker` and for `classifier`.
        marks (`int`, *optional*, defaults to 100): negative marks: samples are looked at one after another until there are so
            many, and all others looked at are positive. `None`: all `mark_samples` samples are looked at.
        negatives, positives (`str`, *optional*): folders of datasets written by `save_to_disk`, with a column of images: with
            what is to be forgotten, and without.
        undesired (`list[int]`, *optional*): numbers on the sheet of the samples that show it; all others there are positive.
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

    method: Literal["adapt_then_unlearn"] | None = field(default=None, metadata={"help": "adapt_then_unlearn"})
    preset: Literal["paper"] | None = field(
        default=None, metadata={"help": "The paper's objective alone; keys that are given win."}
    )
    model: str | None = field(
        default=None, metadata={"help": "'digits-gan', 'fashion-mnist-gan', a folder, or an id on the Hub."}
    )
    marker: str | None = field(
        default=None, metadata={"help": "Classifier that marks samples: 'digits', a folder, or an id on the Hub."}
    )
    forget_classes: list[str] | None = field(
        default=None, metadata={"help": "Classes to forget, by name or number, for marker and classifier."}
    )
    marks: int | None = field(
        default=100, metadata={"help": "Negative marks that marker gives; null: it marks all mark_samples."}
    )
    negatives: str | None = field(
        default=None, metadata={"help": "Folder written by save_to_disk: images with what is to be forgotten."}
    )
    positives: str | None = field(
        default=None, metadata={"help": "Folder written by save_to_disk: images without it."}
    )
    undesired: list[int] | None = field(
        default=None, metadata={"help": "Numbers of the samples on the sheet that show what is to be forgotten."}
    )
    looked_at: int = field(default=200, metadata={"help": "Samples on the sheet."})
    classifier: str | None = field(
        default=None, metadata={"help": "Counts samples before and after: 'digits', a folder, or an id on the Hub."}
    )
    measure_samples: int = field(default=500, metadata={"help": "Samples drawn before and after for the classifier."})
    dataset: str | None = field(
        default=None, metadata={"help": "Real images to compare with: 'digits', a folder, or an id on the Hub."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a dataset on the Hub."})
    eval_split: str | None = field(default=None, metadata={"help": "Split of dataset to compare with."})

    def __post_init__(self):
        if self.method not in self._methods:
            raise ValueError(f"method: {self.method!r} is not one of {', '.join(self._methods)}")
        if not self.model:
            raise ValueError(
                f"model: missing; set it to {', '.join(map(repr, small_gan.NAMES))}, a folder, or an id on the Hub"
            )
        self._check_feedback()
        self._check_measuring()

    def _check_feedback(self) -> None:
        given = [name for name in ("marker", "negatives", "positives", "undesired") if getattr(self, name) is not None]
        for name, other in (("negatives", "positives"), ("positives", "negatives")):
            if given == [name]:
                raise ValueError(f"{other}: missing, which {name} needs; set it to a folder written by save_to_disk")
        if len(given) > 1 and given != ["negatives", "positives"]:
            raise ValueError(f"{given[-1]}: given beside {given[0]}; keep one of them")
        if self.marker is not None and not self.forget_classes:
            raise ValueError("forget_classes: missing; list the classes that marker is to mark, as in [3]")
        if self.marks is not None and self.marks < 1:
            raise ValueError(f"marks={self.marks}: must be ≥ 1, or null to mark all mark_samples samples")
        check_numbers(self.undesired, self.looked_at, others="positive")

    def _check_measuring(self) -> None:
        if self.measure_samples < 2:
            raise ValueError(f"measure_samples={self.measure_samples}: must be ≥ 2")
        if self.forget_classes and not (self.marker or self.classifier):
            raise ValueError(
                "classifier: missing, which forget_classes needs; set it, or marker, to 'digits', a folder, or an id"
            )
        for name, needed, example in (
            ("dataset_revision", "dataset", "an id on the Hub"),
            ("eval_split", "dataset", "'digits', a folder, or an id"),
            ("dataset", "eval_split", "the split to compare with, as in test"),
            ("eval_split", "classifier", "'digits', a folder, or an id"),
            ("eval_split", "forget_classes", "the classes that are not to be compared with, as in [3]"),
        ):
            if getattr(self, name) and not getattr(self, needed):
                raise ValueError(f"{needed}: missing, which {name} needs; set it to {example}")

    def config(self, config_class: type[AdaptThenUnlearnConfig], given: dict[str, Any]) -> AdaptThenUnlearnConfig:
        """The method's config with the keys that were given.

        Raises:
            ValueError: a key that is missing or a value that is not allowed.
        """
        if not given.get("output_dir"):
            raise ValueError("output_dir: missing; set it to the folder that gets the unlearned model")
        if Path(self.model).is_dir() and Path(self.model).resolve() == Path(given["output_dir"]).resolve():
            raise ValueError(f"output_dir: {given['output_dir']!r} holds the original model; choose another folder")
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
    if job.negatives is not None:
        marked = {name: saved_dataset(getattr(job, name), name) for name in ("negatives", "positives")}
    if job.marker is not None and job.marker == job.classifier != "digits":
        logger.warning("classifier: is the one that marks too, so its figures flatter; take another one to count")

    pipeline, _ = as_pipeline(_folder(job.model, config))
    judge = None
    if classifier is not None:
        reference = reference_of(others, classifier, pipeline.image_shape, resize=config.resize)
        judge = Judge(classifier, job.measure_samples, forgotten, reference, job.eval_split, coverage=True)
    if marker is not None and job.marks is None:
        marked["marks"] = lambda images: torch.isin(marker.classify(images), torch.tensor(to_mark))
    elif marker is not None:
        marked = _until_marked(job, config, pipeline, marker, to_mark)
    elif not marked:
        samples = _draw(pipeline, config, job.looked_at)
        if job.undesired is None:
            if config.should_save:
                _write_sheet(samples, Path(config.output_dir, "_private"))
            return
        shows = torch.zeros(len(samples), dtype=torch.bool).index_fill(0, torch.tensor(job.undesired), True)
        marked = {"negatives": samples[shows], "positives": samples[~shows]}

    trainer = trainer_class(pipeline, config, **marked)
    if job.dataset and not Path(job.dataset).exists():
        trainer.card_values = {"dataset_name": job.dataset, "dataset_type": job.dataset}
    if trainer.is_world_process_zero():
        counts = (len(trainer.feedback.negatives), len(trainer.feedback.positives))
        Console(highlight=False, soft_wrap=True).print("marks    {:,} negative, {:,} positive".format(*counts))
    forget_and_report(trainer, judge)


def _folder(model: str, config: AdaptThenUnlearnConfig) -> str:
    if model not in small_gan.NAMES:
        return model
    code = f"from hf_unlearn.examples import gan as s; print(s.cached(s.NAMES[{model!r}], progress=False))"
    return made_once(config, lambda: small_gan.cached(small_gan.NAMES[model]), code)


# Feedback


def _draw(pipeline: GANPipeline, config: AdaptThenUnlearnConfig, count: int, first: int = 0) -> Tensor:
    """Samples `first` to `first + count` of a row that model and seed alone decide, whatever is asked for at a time."""
    shape = pipeline.generator.latent_shape
    latents = [
        torch.randn(shape, generator=seeded_generator("cpu", config.seed, MARK_SEED, number))
        for number in range(first, first + count)
    ]
    return pipeline.to(config.device).draw(torch.stack(latents), batch_size=config.sample_batch_size)


def _write_sheet(samples: Tensor, folder: Path) -> None:
    pages = write_sheet(samples, folder)
    Console(highlight=False, soft_wrap=True).print(
        f"{where_the_sheet_is(pages, len(samples))}: set undesired to the numbers of those that show what is to be "
        "forgotten, and run again",
        markup=False,
    )


def _until_marked(
    job: GANJob, config: AdaptThenUnlearnConfig, pipeline: GANPipeline, marker: ClassifierFeatures, to_mark: list[int]
) -> dict[str, Tensor]:
    """Looks at samples one after another until `marks` of them are negative, at `mark_samples` at most."""
    samples, shows, negatives = [], [], 0
    for first in range(0, config.mark_samples, config.sample_batch_size):
        samples.append(_draw(pipeline, config, min(config.sample_batch_size, config.mark_samples - first), first))
        shows.append(torch.isin(marker.classify(samples[-1]), torch.tensor(to_mark)))
        negatives += int(shows[-1].sum())
        if negatives >= job.marks:
            break
    images, undesired = torch.cat(samples), torch.cat(shows)
    if negatives < job.marks:
        raise ValueError(
            f"marks: {job.marks} are wanted, and marker={job.marker!r} sees forget_classes in {negatives} of "
            f"{len(images)} samples; set a smaller number, or raise mark_samples"
        )
    looked_at = int(undesired.nonzero()[job.marks - 1]) + 1
    images, undesired = images[:looked_at], undesired[:looked_at]
    if undesired.all():
        raise ValueError(
            f"forget_classes: marker={job.marker!r} sees them in all of {looked_at} samples, none is left as positive; "
            "set fewer, or raise marks"
        )
    return {"negatives": images[undesired], "positives": images[~undesired]}


def _classes(job: GANJob, classifier: ClassifierFeatures, argument: str) -> list[int]:
    """`forget_classes` as a classifier numbers them."""
    name = getattr(job, argument)
    return class_numbers(job.forget_classes, classifier, key="forget_classes", argument=argument, name=name)
