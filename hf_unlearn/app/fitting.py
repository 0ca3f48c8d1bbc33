"""From marks to a filter: fitted, told of, saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..files import complete_or_not_there, first_line
from ..filtering.checker import FASTSafetyChecker
from ..filtering.drawing.actions import ACTIONS
from ..filtering.fitting.concept import FilteredConcept
from ..filtering.fitting.fast import FASTFitter
from ..jobs.filter.fit import check_enough, save_filter
from ..jobs.filter.report import TITLES
from ..jobs.filter.source import SHEET_SAMPLES, UNMARKED, Source
from ..jobs.recipe.filter import FilterFitJob


if TYPE_CHECKING:
    from ..filtering.encoding.encoders import FilterEncoder
    from ..filtering.fitting.rates import Rate
    from .marks import Marks
    from .opened import Opened

Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Fitted:
    """A new filter.

    Args:
        job (`FilterFitJob`): what was asked for.
        concept ([`FilteredConcept`]): with threshold, promise and figures.
        checker ([`FASTSafetyChecker`]): the filter.
        blocked (`list[bool]`): of the samples that were looked at, by their numbers.
    """

    job: FilterFitJob
    concept: FilteredConcept
    checker: FASTSafetyChecker
    blocked: list[bool]


def draw_page(found: Opened, job: FilterFitJob, marks: Marks, page: int, told: Told = lambda done, of: None) -> None:
    """Draw the next page of samples to look at, and add it to the marks."""
    source, first = Source(found.pipeline, job), len(marks)
    for start in range(first, first + page, job.batch_size):
        numbers = range(start, min(start + job.batch_size, first + page))
        marks.add(source.draw(SHEET_SAMPLES, numbers), job.prompts)
        told(numbers.stop - first, page)


def fit(
    found: Opened, job: FilterFitJob, marks: Marks, encoder: FilterEncoder | None, *, rest_is_clean: bool, told: Told
) -> Fitted:
    """Fit a filter to marks, and to unmarked samples that are drawn for it.

    Args:
        job ([`FilterFitJob`]): encoder, concept, threshold, rate, confidence, number of unmarked samples.
        encoder ([`FilterEncoder`], *optional*): that `job` names, loaded.
        rest_is_clean (`bool`): whether samples without a mark were looked at and are clean.
        told (callable): hears how many unmarked samples are drawn, of how many.

    Raises:
        ValueError: too few marks for what is asked; nothing was drawn.
    """
    if encoder is None and not found.has_latents:
        raise ValueError(
            f"encoder: missing; {type(found.pipeline).__name__} has no latents to filter by; set it to 'digits', a folder, or an id"
        )
    undesired, clean = marks.of("undesired"), marks.of("clean", rest_is_clean=rest_is_clean)
    if len(undesired) < 2:
        raise ValueError(f"undesired: {len(undesired)} samples are marked; mark at least 2, better 20")
    check_enough(job, len(undesired), len(clean))
    latents = encoder is None
    fitter = FASTFitter(
        encoder, score=job.score, concepts={job.concept: job.description}, seed=job.seed, batch_size=job.batch_size
    )
    for kind, numbers in (("undesired", undesired), ("clean", clean)):
        if numbers:
            fitter.update(**{kind: marks.seen(numbers, latents=latents)}, value_range=(-1, 1))
    source = Source(found.pipeline, job)
    for first in range(0, job.unmarked, job.batch_size):
        batch = source.draw(UNMARKED, range(first, min(first + job.batch_size, job.unmarked)))
        fitter.update(unmarked=batch.latents if latents else batch.images, value_range=(-1, 1))
        told(min(first + job.batch_size, job.unmarked), job.unmarked)
    result = fitter.fit(threshold=job.threshold, rate=job.rate, confidence=job.confidence)
    checker = result.checker()
    numbers = range(len(marks))
    verdicts = [
        checker.judge(marks.seen([*numbers[first : first + 64]], latents=latents), value_range=(-1, 1)).flags
        for first in range(0, len(marks), 64)
    ]
    return Fitted(job, result[job.concept], checker, torch.cat(verdicts).tolist())


# What is said of it


def promise(fitted: Fitted) -> str:
    """The promise as two short lines: what holds, and over what."""
    text = fitted.concept.threshold.promise or "Nothing is promised: the paper's threshold."
    what, _, over = text.partition(", with ")
    return f"{what[0].upper()}{what[1:]}.\n" + (f"With {over}." if over else "")


def rows(fitted: Fitted) -> list[tuple[str, str, str, str]]:
    """What is known of the filter, a row a figure: what, share, 95 % interval, from how many."""
    figures = fitted.concept.figures
    return [(title, *_row(getattr(figures, name))) for name, title in TITLES.items()]


def _row(rate: Rate | None) -> tuple[str, str, str]:
    if rate is None:
        return "not known", "", ""
    interval = f"{100 * rate.low:.1f} to {100 * rate.high:.1f} %" if rate.low < rate.high else ""
    return f"{100 * rate.value:.1f} %", interval, "" if rate.total is None else f"{rate.count:,} of {rate.total:,}"


def leak(fitted: Fitted) -> str:
    """What still gets through, in a sentence."""
    figures, residual = fitted.concept.figures, fitted.concept.figures.residual
    if residual is None:
        apart = figures.recall and figures.false_alarm and figures.recall.value <= figures.false_alarm.value
        why = (
            "the filter does not tell the two apart; mark more"
            if apart
            else "that needs clean marks and unmarked samples"
        )
        return f"How much of what is released is still undesired is not known: {why}."
    return (
        f"Of what is released, about {100 * residual.value:.1f} % is still undesired "
        f"(between {100 * residual.low:.1f} and {100 * residual.high:.1f} %)."
    )


def on_marks(fitted: Fitted, marks: Marks, *, rest_is_clean: bool) -> str:
    """What the filter does to the samples that were looked at."""
    counts = {}
    for kind in ("undesired", "clean"):
        numbers = [n for n in marks.of(kind, rest_is_clean=rest_is_clean) if n < len(fitted.blocked)]
        counts[kind] = sum(fitted.blocked[number] for number in numbers), len(numbers)
    (hit, undesired), (wrong, clean) = counts["undesired"], counts["clean"]
    return (
        f"On the samples above it blocks {hit} of {undesired} that you marked undesired, and {wrong} of {clean} clean ones. "
        "It has seen these marks, so the table says more."
    )


# Saving


def save(
    found: Opened, fitted: Fitted, output_dir: str | Path, name: str, *, whole: bool = True, action: str = "blank"
) -> tuple[Path, list[str]]:
    """Write the filter with its card, and with `whole` the pipeline with its filter beside it.

    Args:
        output_dir (`str` or `Path`): gets a folder of that name, with `filter/` and `pipeline/` in it.
        name (`str`): of the folder: letters, digits, `.`, `_` and `-`.
        whole (`bool`, defaults to `True`): save the pipeline too.
        action (`str`, defaults to `"blank"`): what the pipeline does with what is blocked.

    Returns:
        The folder, and lines of Python that use what is in it.

    Raises:
        ValueError: a name that is none, a folder that is there already, or one that cannot be written.
    """
    name = name.strip()
    if not name or name.startswith(".") or not all(c.isalnum() or c in "._-" for c in name):
        raise ValueError(
            f"name={name[:50]!r}: must be of letters, digits, '.', '_' and '-', and begin with a letter or digit"
        )
    if action not in ACTIONS:
        raise ValueError(f"action={action!r}: must be one of {', '.join(ACTIONS)}")
    folder = Path(output_dir, name)
    if folder.exists():
        raise ValueError(f"name={name!r}: {folder} is there already; choose another name")
    keys = {"pipeline": found.public or found.names[0], "prompts": None, "guidance_scale": None}
    try:
        with complete_or_not_there(folder) as scratch:
            keys |= {"output_dir": str(scratch / "filter"), "action": action if whole else None}
            keys |= {"pipeline_dir": str(scratch / "pipeline") if whole else None}
            save_filter(replace(fitted.job, **keys), fitted.checker, found.pipeline)
    except OSError as error:
        raise ValueError(f"output_dir: {str(folder)!r} cannot be written ({first_line(error)})") from error
    if whole:
        return folder, usage(found, str(folder / "pipeline"))
    return folder, usage(found, found.folder, str(folder / "filter"))


def usage(found: Opened, pipeline: str, filter: str | None = None) -> list[str]:
    """Lines of Python that draw with a pipeline that was saved with its filter, or with both: folders or ids."""
    loaded = f'"{pipeline}"' if filter is None else f'"{pipeline}", filter="{filter}"'
    code = ["from hf_unlearn import FilteredPipeline", "", f"pipe = FilteredPipeline.from_pretrained({loaded})"]
    call = 'prompt="…"' if found.prompted else "num_images=8" if found.has_latents else "batch_size=8"
    return [*code, f"output = pipe({call})", "output.images, output.filtered"]
