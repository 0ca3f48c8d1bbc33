"""What `hf-unlearn filter` says of a fitted filter: figures, promise, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from ...files import PRIVATE
from ...plots import image_grid
from ..keys import console, show_code
from .source import UNMARKED, Batch, Source


if TYPE_CHECKING:
    from ...filtering.checker import FASTSafetyChecker
    from ...filtering.encoding.encoders import FilterEncoder
    from ...filtering.fitting.concept import FilteredConcept, FilterFigures
    from ...filtering.fitting.rates import Rate

KEPT = 2**28  # bytes of unmarked samples that are kept, to be shown
SHOWN = 12  # of each kind, in a picture
TITLES = {
    "recall": "undesired blocked (recall)",
    "false_alarm": "clean blocked (false alarms)",
    "blocked": "blocked of all",
    "release": "released of all",
    "prevalence": "undesired before (prevalence)",
    "residual": "undesired after (residual)",
}


class Fit(Protocol):
    """The keys of a recipe that its report tells of."""

    folder: Path
    batch_size: int
    seed: int
    max_prevalence: float | None
    pipeline_dir: str | None
    pipeline_revision: str | None
    prompts: list[str] | None


# Pictures


def as_bytes(images: Tensor) -> Tensor:
    """Of images in [−1, 1]."""
    return ((images + 1) * 127.5).round().to(torch.uint8)


def keep(kept: list[Tensor], batch: Batch, encoder: FilterEncoder | None) -> None:
    """What the filter sees, images as bytes, as long as it is not too much to be kept."""
    seen = batch.latents if encoder is None else as_bytes(batch.images)
    if not kept or sum(part.nbytes for part in kept) + seen.nbytes <= KEPT:
        kept.append(seen)


def pictures_of(job: Fit, checker: FASTSafetyChecker, source: Source, kept: list[Tensor]) -> list[str]:
    """Unmarked samples on either side of the line, and some that are blocked. Private, since they show what is undesired."""
    folder = job.folder / PRIVATE
    files = {name: folder / f"{name}.png" for name in ("border", "blocked")}
    for file in files.values():
        file.unlink(missing_ok=True)
    if not kept:
        return []
    scores, flags = _judged(checker, torch.cat(kept), job.batch_size)
    order, random = np.argsort(scores, kind="stable"), np.random.default_rng(job.seed)
    released, blocked = order[~flags[order]][::-1][:SHOWN], order[flags[order]][:SHOWN]
    some = np.sort(random.permutation(np.flatnonzero(flags))[: 2 * SHOWN])
    lines = []
    for name, groups, text in (
        (
            "border",
            (("released", released), ("blocked", blocked)),
            "the released ones with the highest scores, and the blocked ones with the lowest",
        ),
        ("blocked", (("blocked", some),), "some that are blocked"),
    ):
        numbers = [int(number) for _, group in groups for number in group]
        if not numbers:
            continue
        captions = [f"{kind}\n{scores[number]:#.3g}" for kind, group in groups for number in group]
        parts = (numbers[first : first + job.batch_size] for first in range(0, len(numbers), job.batch_size))
        images = torch.cat([source.draw(UNMARKED, part).images for part in parts])
        image_grid(as_bytes(images).permute(0, 2, 3, 1).numpy(), captions, files[name])
        lines.append(f"{files[name]}: {text}")
    return lines


def _judged(checker: FASTSafetyChecker, kept: Tensor, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    verdicts = [checker.judge(part, value_range=(-1, 1)) for part in kept.split(batch_size)]
    scores = torch.cat([verdict.scores[:, 0] for verdict in verdicts])
    return scores.numpy(), torch.cat([verdict.flags for verdict in verdicts]).numpy()


# Text


def report(job: Fit, concept: FilteredConcept, source: Source, name: str, pictures: Sequence[str]) -> None:
    """Print what was found, where it is, and how to use it.

    Args:
        name (`str`): folder or id of the pipeline.
        pictures (`Sequence[str]`): a line for each.
    """
    show = console()
    show.print(figures_table(concept))
    lines = [f"from     {_origins(concept.figures)}"]
    lines += [f"promise  {concept.threshold.promise or 'none: this threshold promises nothing'}"]
    if job.max_prevalence is not None:
        most = 100 * concept.threshold.rate * (1 - job.max_prevalence)
        lines.append(
            f"note     max_prevalence: at most {most:.3g} % of all samples are blocked, so where more are undesired, the rest "
            "passes; clean marks allow more"
        )
    lines += [f"filter   {job.folder}", f"card     {job.folder / 'README.md'}"]
    if job.pipeline_dir is not None:
        lines.append(f"pipeline {job.pipeline_dir} (with its filter)")
    lines += [f"picture  {picture}" for picture in pictures]
    if pictures:
        lines.append(f"private  {job.folder / '_private'} (shows what is undesired: never publish it)")
    show.print("\n".join([*lines, "", "Use it:", ""]), markup=False)
    show_code(usage(job, source, name))


def figures_table(concept: FilteredConcept) -> Table:
    """What is known of a filter, with intervals."""
    figures = concept.figures
    table = Table(
        title=f"{concept.name}: {figures.undesired:,} undesired and {figures.clean:,} clean marks, "
        f"{figures.unmarked:,} unmarked samples"
    )
    start_columns(table)
    for name, title in TITLES.items():
        add_rate(table, title, getattr(figures, name))
    if figures.auc is not None:
        table.add_row("area under the ROC curve", f"{figures.auc:.3f}", "", "")
    return table


def start_columns(table: Table) -> None:
    for heading in ("", "share", "95 % interval", "counted"):
        table.add_column(heading, justify="right" if heading else "left")


def add_rate(table: Table, title: str, rate: Rate | None) -> None:
    """A row of a share, its interval, and what it was counted from."""
    if rate is None:
        table.add_row(title, "not known", "", "")
        return
    counted = "" if rate.total is None else f"{rate.count:,} of {rate.total:,}"
    interval = f"{100 * rate.low:.1f} to {100 * rate.high:.1f}" if rate.low < rate.high else ""
    table.add_row(title, f"{100 * rate.value:.1f} %", interval, counted)


def _origins(figures: FilterFigures) -> str:
    """Which samples the figures are from."""
    known = {"recall": figures.recall_from, "false alarms": figures.false_alarm_from}
    given = figures.prevalence is not None and figures.prevalence.low == figures.prevalence.high
    known["prevalence"] = "as given" if given else None
    known["blocked"] = "unmarked samples" if figures.blocked else None
    return ", ".join(f"{name}: {origin}" for name, origin in known.items() if origin) or "nothing"


def usage(job: Fit, source: Source, name: str) -> list[str]:
    """Lines of Python that draw through the filter."""
    given: dict[str, Any] = {"filter": str(job.folder), "action": "regenerate"}
    if job.pipeline_dir is not None:
        name, given = job.pipeline_dir, {}
    elif job.pipeline_revision is not None:
        given["revision"] = job.pipeline_revision
    loaded = ", ".join([json.dumps(name), *(f"{key}={json.dumps(value)}" for key, value in given.items())])
    call = source.arguments(UNMARKED, range(8))
    del call["generator"]
    if "prompt" in call:
        call["prompt"] = job.prompts[0]
    drawn = ", ".join(f"{key}={json.dumps(value)}" for key, value in call.items())
    return [
        "from hf_unlearn import FilteredPipeline",
        "",
        f"pipe = FilteredPipeline.from_pretrained({loaded})",
        f"output = pipe({drawn})",
        "output.images, output.filtered, output.filter_scores",
    ]
