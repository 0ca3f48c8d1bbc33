"""The job of `hf-unlearn filter run`: images drawn through a filter, and what it said of each."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.table import Table

from ...filtering.drawing.actions import FilteredImageError
from ...plots import image_grid
from ..keys import check_machine, console
from ..recipe.filter import VERDICTS, FilterRunJob
from .source import RUN, Source, filtered_pipeline


GRID = "grid.png"
IN_GRID = 100


def run_filtered(job: FilterRunJob) -> dict[str, Any]:
    """Draw, write what is released and what stands in for the rest, and say what the filter said.

    Raises:
        ValueError: something in the recipe does not fit, or with `action: raise` an image is not released; nothing was written.
    """
    check_machine(job, "filter")
    settings = {name: getattr(job, name) for name in ("action", "max_tries") if getattr(job, name) is not None}
    pipe = filtered_pipeline(job, **settings)
    source = Source(pipe.pipeline, job)
    count = job.num_images or len(job.prompts or ()) or 36
    images, verdicts = [], []
    for first in range(0, count, job.batch_size):
        numbers = range(first, min(first + job.batch_size, count))
        call = source.arguments(RUN, numbers)
        try:
            output = pipe(**call, output_type="pil")
        except FilteredImageError as error:
            which = ", ".join(str(numbers[place]) for place in error.flags.nonzero().flatten().tolist())
            raise ValueError(f"action: raise, and images are not released: {which}; nothing was written") from error
        images += output.images
        for place, number in enumerate(numbers):
            verdicts.append(
                {
                    "file": f"{number:05}.png",
                    "filtered": bool(output.filtered[place]),
                    "tries": int(output.filter_tries[place]),
                    "scores": _scores(pipe.safety_checker.concepts, output.filter_scores[place].tolist()),
                }
                | ({"prompt": call["prompt"][place]} if "prompt" in call else {})
            )
    _write(job.images_folder, images, verdicts, pipe)
    _report(job, verdicts, pipe)
    figures = {"images": len(verdicts), "not_released": sum(verdict["filtered"] for verdict in verdicts)}
    return {"figures": figures, "action": pipe.action, "places": {"images": job.images_folder}}


def _scores(concepts: tuple[str, ...], values: list[float]) -> dict[str, float | None]:
    """JSON has no NaN: null is a score that is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in zip(concepts, values, strict=True)}


def _write(folder: Path, images: list[Any], verdicts: list[dict[str, Any]], pipe: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("[0-9]" * 5 + ".png"), folder / VERDICTS, folder / GRID):
        old.unlink(missing_ok=True)
    for image, verdict in zip(images, verdicts, strict=True):
        image.save(folder / verdict["file"])
    captions = [_caption(number, verdict, pipe.action) for number, verdict in enumerate(verdicts)]
    image_grid(images[:IN_GRID], captions[:IN_GRID], folder / GRID, columns=10 if len(images) > 36 else 6)
    content = {
        "action": pipe.action,
        "thresholds": pipe.safety_checker.thresholds,
        "filter": pipe.safety_checker.config.fingerprint,
        "images": verdicts,
    }
    (folder / VERDICTS).write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _caption(number: int, verdict: dict[str, Any], action: str) -> str:
    if verdict["filtered"]:
        return f"{number} {'flagged' if action == 'flag' else 'blocked'}"
    return f"{number} (try {verdict['tries']})" if verdict["tries"] > 1 else str(number)


def _report(job: FilterRunJob, verdicts: list[dict[str, Any]], pipe: Any) -> None:
    thresholds = pipe.safety_checker.thresholds
    again = sum(verdict["tries"] > 1 for verdict in verdicts)
    blocked = sum(verdict["filtered"] for verdict in verdicts)
    table = Table(title=f"{len(verdicts):,} images, action {pipe.action}")
    table.add_column("")
    table.add_column("images", justify="right")
    table.add_row("released" if pipe.action != "flag" else "not flagged", f"{len(verdicts) - blocked:,}")
    if pipe.action == "regenerate":
        table.add_row("drawn more than once", f"{again:,}")
    table.add_row("not released" if pipe.action != "flag" else "flagged, and written as they are", f"{blocked:,}")
    if len(thresholds) > 1:
        for name, threshold in thresholds.items():
            values = [verdict["scores"][name] for verdict in verdicts]
            table.add_row(f"above the threshold of {name}", f"{sum(v is None or v > threshold for v in values):,}")
    show = console()
    show.print(table)
    folder = job.images_folder
    show.print(f"images   {folder}\ngrid     {folder / GRID}\nverdicts {folder / VERDICTS}", markup=False)
