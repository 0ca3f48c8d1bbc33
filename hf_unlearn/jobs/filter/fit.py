"""The job of `hf-unlearn filter fit`: samples are marked, a filter is learned from the marks, and saved with its card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...examples.named import made
from ...files import PRIVATE, first_line
from ...filtering.card import filter_card
from ...filtering.drawing.actions import ACTIONS
from ...filtering.drawing.pipeline import FilteredPipeline
from ...filtering.encoding.encoders import FilterEncoder
from ...filtering.fitting.fast import RATES, FASTFitter
from ...filtering.fitting.thresholds import samples_needed
from ...hub.origin import hub_id
from ..judging import classifier_of
from ..keys import check_machine, command_line, console, device_of, show_code
from ..marking import class_numbers, images_in, where_the_sheet_is, write_sheet
from ..recipe.filter import SMALL, FilterFitJob
from .report import as_bytes, keep, pictures_of, report
from .source import (
    SHEET_SAMPLES,
    UNMARKED,
    Batch,
    Source,
    plain_pipeline,
)


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ...filtering.checker import FASTSafetyChecker


# Of the classifiers of digits: the one that judges has 0, so that neither marks nor embeddings are its own.
MARKER_SEED, ENCODER_SEED = 1, 2


def run_fit(job: FilterFitJob, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Mark, draw, fit, save, and say where things are; or write the sheet to mark, where no marks are given.

    Args:
        arguments (`Sequence[str]`): of the command line, for the next one.

    Raises:
        ValueError: something in the recipe does not fit the pipeline or the marks; no filter was written.
    """
    check_machine(job, "filter")
    # What costs seconds to find wrong comes before what costs minutes to draw.
    marks = _marks(job)
    encoder = encoder_of(job)
    pipeline, name = plain_pipeline(job)
    source = Source(pipeline, job)
    if encoder is None and not source.has_latents:
        raise ValueError(
            f"encoder: missing; {type(pipeline).__name__} has no latents to filter by; set it to 'digits', a folder, or an id"
        )
    if not job.marked:
        return {"sheets": _write_sheet(job, source, arguments)}
    fitter = FASTFitter(
        encoder, score=job.score, concepts={job.concept: job.description}, seed=job.seed, batch_size=job.batch_size
    )
    check_enough(job, *marks(fitter, source))
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
    save_filter(job, checker, pipeline)
    pictures = pictures_of(job, checker, source, kept)
    report(job, result[job.concept], source, name, pictures)
    return {"figures": result[job.concept].figures, "promise": result[job.concept].threshold.promise}


def encoder_of(job: FilterFitJob) -> FilterEncoder | None:
    """What sees the images; None for a generator's own latents.

    Raises:
        ValueError: it cannot be had, or sees something else.
    """
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
    return encoder.to(device_of(job))


def save_filter(job: FilterFitJob, checker: FASTSafetyChecker, pipeline: DiffusionPipeline) -> None:
    """The filter with its card into `output_dir`, and the pipeline with it into `pipeline_dir` where there is one."""
    checker.save_pretrained(job.folder)
    public = None if job.pipeline in SMALL else hub_id(job.pipeline)
    (job.folder / "README.md").write_text(filter_card(checker.config, pipeline_id=public), encoding="utf-8")
    checker.write_record(job.folder)
    if job.pipeline_dir is not None:
        FilteredPipeline(pipeline, checker, action=job.action or ACTIONS[0]).save_pretrained(job.pipeline_dir)


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
    marker = classifier_of(job.marker, None, argument="marker", seed=MARKER_SEED)
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


def check_enough(job: FilterFitJob, undesired: int, clean: int) -> None:
    """Said before many samples are drawn that are not marked.

    Raises:
        ValueError: too few marks for what is asked.
    """
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


def _write_sheet(job: FilterFitJob, source: Source, arguments: Sequence[str]) -> list[Path]:
    samples = [as_bytes(batch.images) for batch in source.batches(SHEET_SAMPLES, job.looked_at, "drawing samples")]
    pages = write_sheet(torch.cat(samples), job.folder / PRIVATE)
    console().print(
        f"{where_the_sheet_is(pages, job.looked_at)}: look at them, and go on with the numbers of those that show what is "
        "undesired, as in\n",
        markup=False,
    )
    show_code([command_line("filter fit", [*arguments, "--undesired", "3", "17", "42"])])
    return pages
