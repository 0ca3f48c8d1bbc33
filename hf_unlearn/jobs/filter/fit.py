"""The job of `hf-unlearn filter fit`: samples are marked, a filter is learned from the marks, and saved with its card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ...examples.named import made
from ...files import first_line
from ...filtering.card import filter_card
from ...filtering.drawing.actions import ACTIONS
from ...filtering.drawing.pipeline import FilteredPipeline
from ...filtering.drawing.saved import CLASS_NAME, INDEX, read_index
from ...filtering.encoding.encoders import FilterEncoder
from ...filtering.fitting.fast import RATES, FASTFitter
from ...filtering.fitting.thresholds import samples_needed
from ...hub.origin import hub_id
from ..judging import classifier_of
from ..keys import check_at_most_one, check_needs, command_line, console, show_code
from ..marking import check_numbers, class_numbers, images_in, where_the_sheet_is, write_sheet
from .report import as_bytes, keep, pictures_of, report
from .source import (
    SHEET_SAMPLES,
    SMALL,
    UNMARKED,
    Batch,
    PipelineJob,
    Source,
    check_alone,
    holds_a_filter,
    plain_pipeline,
)


# Of the classifiers of digits: the one that judges has 0, so that neither marks nor embeddings are its own.
MARKER_SEED, ENCODER_SEED = 1, 2
WAYS = ("marker", "undesired", "undesired_folder")


@dataclass
class FilterFitJob(PipelineJob):
    """What is to be filtered: the keys of `hf-unlearn filter fit` besides those of [`PipelineJob`].

    What is undesired is said by marks: by a classifier that plays the user (`marker` with `classes`), by numbers on a
    sheet of samples (`undesired`), or by a folder of images (`undesired_folder`). With none of the three the job writes the
    sheet and ends.

    Args:
        encoder (`str`, *optional*): sees the images: `"digits"` (a classifier without its head), a folder or an id of an image
            model. `None`: the generator's own latents are filtered, of a [`GANPipeline`].
        encoder_revision, encoder_layer, encoder_pooling, store_encoder (*optional*): see [`FilterEncoder.from_pretrained`].
        concept, description (`str`): what is filtered, for people.
        marker (`str`, *optional*): `"digits"`, a folder or an id of an image classifier: of `looked_at` samples those that it
            sees one of `classes` in are undesired, all others clean.
        marks (`int`, *optional*): undesired marks that it gives at most. Default: all.
        undesired (`list[int]`, *optional*): numbers on the sheet of the samples that show it; all others there are clean.
        looked_at (`int`, defaults to 200): samples that are looked at, by `marker` or on the sheet.
        undesired_folder, clean_folder (`str`, *optional*): image files, or a dataset written by `save_to_disk`.
        unmarked (`int`, defaults to 2,000): further samples, which nobody looks at.
        score, threshold, rate, confidence, max_prevalence, prevalence, augment (*optional*): see [`FASTFitter`] and its `fit`.
        pipeline_dir (`str`, *optional*): gets the pipeline with its filter, to be loaded as one.
        action (`str`, *optional*): of the pipeline there.

    Raises:
        ValueError: a key that is missing, two that exclude each other, or a value that is not allowed.
    """

    _argument_group_name = "filter"
    _ranges = {
        "≥ 2": ("marks",),
        "≥ 0": ("unmarked", "augment"),
        "in (0, 1)": ("rate", "confidence", "max_prevalence", "prevalence"),
    }

    encoder: str | None = None
    encoder_revision: str | None = None
    encoder_layer: int | None = None
    encoder_pooling: Literal["pooled", "mean", "first"] | None = None
    store_encoder: bool = True
    concept: str = "undesired"
    description: str = ""
    marker: str | None = None
    classes: list[str] | None = None
    marks: int | None = None
    undesired: list[int] | None = None
    looked_at: int = 200
    undesired_folder: str | None = None
    clean_folder: str | None = None
    unmarked: int = 2000
    score: Literal["quadratic", "lda", "linear_svc", "mean_difference"] = "quadratic"
    threshold: Literal["max_false_alarm", "min_recall", "pooled_mean"] = "max_false_alarm"
    rate: float | None = None
    confidence: float = 0.95
    max_prevalence: float | None = None
    prevalence: float | None = None
    augment: int = 0
    pipeline_dir: str | None = None
    action: Literal["blank", "blur", "flag", "regenerate", "raise"] | None = None

    def __post_init__(self):
        super().__post_init__()
        if not self.concept.strip():
            raise ValueError("concept: is empty; name what is filtered, as in 'weapons'")
        self._check_encoder()
        self._check_marks()
        self._check_threshold()
        self._check_folders()

    @property
    def marked(self) -> bool:
        return any(getattr(self, way) is not None for way in WAYS)

    def _check_encoder(self) -> None:
        for name in ("encoder_revision", "encoder_layer", "encoder_pooling"):
            if getattr(self, name) is not None and self.encoder is None:
                raise ValueError(f"encoder: missing, which {name} needs; set it to 'digits', a folder, or an id")
        if not self.store_encoder and (self.encoder in (None, "digits") or Path(self.encoder).is_dir()):
            raise ValueError("store_encoder=False: only an encoder on the Hub can be referred to; leave it out")

    def _check_marks(self) -> None:
        check_at_most_one(self, WAYS)
        check_needs(
            self,
            ("marker", "classes", "the classes that it is to mark, as in [3]"),
            ("marks", "marker", "'digits', a folder, or an id"),
            ("clean_folder", "undesired_folder", "a folder of images that show what is undesired"),
            ("undesired_folder", "encoder", "'digits', a folder, or an id: images have no latents"),
        )
        check_numbers(self.undesired, self.looked_at, others="clean")

    def _check_threshold(self) -> None:
        if self.threshold == "pooled_mean" and self.rate is not None:
            raise ValueError("rate: given beside threshold: pooled_mean, which promises nothing; leave it out")
        if self.max_prevalence is not None and self.threshold != "max_false_alarm":
            raise ValueError("max_prevalence: is for threshold: max_false_alarm only; leave it out")
        if self.augment and self.score == "quadratic":
            raise ValueError(
                "augment: is for linear scores; leave it out, or set score to mean_difference or linear_svc"
            )
        unmarked_clean = self.undesired_folder is not None and self.clean_folder is None
        if self.threshold == "max_false_alarm" and self.max_prevalence is None and unmarked_clean:
            raise ValueError(
                "clean_folder: missing, which threshold: max_false_alarm is calibrated on; set it, or max_prevalence, or "
                "another threshold"
            )

    def _check_folders(self) -> None:
        written = [
            name for name in ("config.json", "model.safetensors", "README.md", INDEX) if (self.folder / name).exists()
        ]
        if written and not holds_a_filter(self.folder):
            raise ValueError(
                f"output_dir: {self.output_dir!r} holds {written[0]}, which is of no filter; choose another folder"
            )
        if self.pipeline_dir is None:
            return
        folder = Path(self.pipeline_dir)
        if folder.resolve() == self.folder.resolve():
            raise ValueError("pipeline_dir: is output_dir too; choose another folder")
        if folder.is_dir() and any(folder.iterdir()):
            try:
                kind = read_index(folder).get("_class_name")
            except ValueError:
                kind = None
            if kind != CLASS_NAME:
                raise ValueError(f"pipeline_dir: {self.pipeline_dir!r} holds something else; choose another folder")


def run_fit(job: FilterFitJob, arguments: Sequence[str] = ()) -> None:
    """Mark, draw, fit, save, and say where things are; or write the sheet to mark, where no marks are given.

    Args:
        arguments (`Sequence[str]`): of the command line, for the next one.

    Raises:
        ValueError: something in the recipe does not fit the pipeline or the marks; no filter was written.
    """
    check_alone()
    # What costs seconds to find wrong comes before what costs minutes to draw.
    marks = _marks(job)
    encoder = _encoder(job)
    pipeline, name = plain_pipeline(job)
    source = Source(pipeline, job)
    if encoder is None and not source.has_latents:
        raise ValueError(
            f"encoder: missing; {type(pipeline).__name__} has no latents to filter by; set it to 'digits', a folder, or an id"
        )
    if not job.marked:
        _write_sheet(job, source, arguments)
        return
    fitter = FASTFitter(
        encoder, score=job.score, concepts={job.concept: job.description}, seed=job.seed, batch_size=job.batch_size
    )
    _check_enough(job, *marks(fitter, source))
    kept: list[Tensor] = []
    for batch in source.batches(UNMARKED, job.unmarked, "drawing unmarked samples"):
        fitter.update(unmarked=batch.images if encoder else batch.latents, value_range=(-1, 1))
        keep(kept, batch, encoder)
    result = fitter.fit(
        threshold=job.threshold,
        rate=job.rate,
        confidence=job.confidence,
        max_prevalence=job.max_prevalence,
        prevalence=job.prevalence,
        augment=job.augment,
    )
    checker = result.checker()
    checker.save_pretrained(job.folder)
    public = None if job.pipeline in SMALL else hub_id(job.pipeline)
    (job.folder / "README.md").write_text(filter_card(checker.config, pipeline_id=public), encoding="utf-8")
    pictures = pictures_of(job, checker, source, kept)
    if job.pipeline_dir is not None:
        FilteredPipeline(pipeline, checker, action=job.action or ACTIONS[0]).save_pretrained(job.pipeline_dir)
    report(job, result[job.concept], source, name, pictures)


def _encoder(job: FilterFitJob) -> FilterEncoder | None:
    if job.encoder is None:
        return None
    name = str(made("digits", seed=ENCODER_SEED)) if job.encoder == "digits" else job.encoder
    try:
        encoder = FilterEncoder.from_pretrained(
            name,
            revision=job.encoder_revision,
            layer=job.encoder_layer,
            pooling=job.encoder_pooling,
            store=job.store_encoder,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"encoder={job.encoder!r}: cannot be had ({first_line(error)})") from error
    if encoder.kind != "image":
        raise ValueError(f"encoder={job.encoder!r}: takes {encoder.kind}s; set it to an image model")
    return encoder.to(job.on)


# Marks


def _marks(job: FilterFitJob) -> Callable[[FASTFitter, Source], tuple[int, int]]:
    """What hands the marks to a fitter, and gives the numbers of undesired and of clean ones; with what it needs loaded."""
    if job.undesired_folder is not None:
        folders = {"undesired": "undesired_folder", "clean": "clean_folder"}
        images = {kind: images_in(getattr(job, key), key) for kind, key in folders.items() if getattr(job, key)}

        def of_folders(fitter: FASTFitter, source: Source) -> tuple[int, int]:
            for kind, found in images.items():
                try:
                    fitter.update(**{kind: found})
                except ValueError as error:
                    raise ValueError(f"{folders[kind]}: {error}") from error
            return len(images["undesired"]), len(images.get("clean", ()))

        return of_folders
    if job.marker is None:
        numbers = set(job.undesired or ())
        return lambda fitter, source: _look(
            job, fitter, source, lambda batch: torch.tensor([number in numbers for number in batch.numbers])
        )
    marker = classifier_of(job.marker, job, argument="marker", seed=MARKER_SEED)
    classes = torch.tensor(class_numbers(job.classes, marker, key="classes", argument="marker", name=job.marker))
    return lambda fitter, source: _look(
        job, fitter, source, lambda batch: torch.isin(marker.classify(batch.images), classes)
    )


def _look(job: FilterFitJob, fitter: FASTFitter, source: Source, shows: Callable[[Batch], Tensor]) -> tuple[int, int]:
    """At one sample after another; undesired ones beyond `marks` are left out."""
    counts = {"undesired": 0, "clean": 0}
    for batch in source.batches(SHEET_SAMPLES, job.looked_at, "drawing samples to mark"):
        seen, undesired = batch.images if fitter.encoder else batch.latents, shows(batch)
        allowed = len(undesired) if job.marks is None else job.marks - counts["undesired"]
        kinds = {"undesired": seen[undesired][:allowed], "clean": seen[~undesired]}
        for kind, samples in kinds.items():
            if len(samples):
                fitter.update(**{kind: samples}, value_range=(-1, 1))
                counts[kind] += len(samples)
    if job.marker is not None and counts["undesired"] < 2:
        raise ValueError(
            f"classes: marker={job.marker!r} sees them in {counts['undesired']} of {job.looked_at} samples; raise "
            "looked_at"
        )
    return counts["undesired"], counts["clean"]


def _check_enough(job: FilterFitJob, undesired: int, clean: int) -> None:
    """Said before many samples are drawn that are not marked."""
    rate = RATES.get(job.threshold) if job.rate is None else job.rate
    if job.threshold == "pooled_mean":
        return
    if job.threshold == "min_recall":
        kind, allowed, held = "undesired", 1 - rate, round(undesired / 2)
    elif job.max_prevalence is not None:
        kind, allowed, held = "unmarked", rate * (1 - job.max_prevalence), job.unmarked // 2
    else:  # against the unmarked pool, no clean mark is needed for fitting
        kind, allowed, held = "clean", rate, clean if job.score == "quadratic" and job.unmarked else round(clean / 2)
    needed = samples_needed(allowed, job.confidence)
    if held < needed:
        more = {"undesired": "mark more", "unmarked": "raise unmarked", "clean": "mark more, set max_prevalence"}[kind]
        raise ValueError(
            f"rate: {job.threshold} {rate:g} with confidence {job.confidence:g} needs {needed} {kind} samples that are not "
            f"used in fitting, there are {held}; {more}, or ask for less"
        )


def _write_sheet(job: FilterFitJob, source: Source, arguments: Sequence[str]) -> None:
    samples = [as_bytes(batch.images) for batch in source.batches(SHEET_SAMPLES, job.looked_at, "drawing samples")]
    pages = write_sheet(torch.cat(samples), job.folder / "_private")
    console().print(
        f"{where_the_sheet_is(pages, job.looked_at)}: look at them, and go on with the numbers of those that show what is "
        "undesired, as in\n",
        markup=False,
    )
    show_code([command_line("filter fit", [*arguments, "--undesired", "3", "17", "42"])])
