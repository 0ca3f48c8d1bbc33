"""An audit to look at: one picture, and one page that needs no other file."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .. import plots
from ..files import kept_private
from ..images import data_uri
from .equivalence import CONFIDENCE
from .findings import AuditFindings
from .result import CheckResult


TEMPLATE = Path(__file__).with_name("page.html.jinja")
LAYERS = {
    "output": "What anyone sees",
    "below": "What comes back",
    "distance": "Told from retrained models",
    "beside": "What else was lost (not judged)",
}
PARTS = ("training", "unlearning", "evaluation")  # of the variance over training seeds
HEADINGS = ("audited", "original", "retrained", "distance", "margin", "rows", "status")


def picture(report: AuditFindings, path: str | Path) -> Path:
    """The checks beside their margins, and recovery curves. A PNG file."""
    title = f"{report.verdict.word}: {report.forgotten}"
    return plots.audit_page(
        [_bar(one) for one in report.results if one.layer != "beside"], _curves(report.results), path, title=title
    )


def page(report: AuditFindings, path: str | Path, drawn: str | Path | None = None) -> Path:
    """The same with all numbers, what each check can show, and what was not checked. An HTML file; `drawn` is its picture, if it is there."""
    from jinja2 import Environment

    with (
        tempfile.TemporaryDirectory() as scratch,
        Image.open(drawn or picture(report, Path(scratch, "audit.png"))) as opened,
    ):
        image = data_uri(opened)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["first_upper"] = lambda text: text[:1].upper() + text[1:]
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    layers = [(title, [_row(one) for one in report.results if one.layer == layer]) for layer, title in LAYERS.items()]
    open_ = {**{name: f"failed: {why}" for name, why in report.failed.items()}, **report.skipped, **report.unchecked}
    with kept_private(path) as path:
        path.write_text(
            text.render(
                report=report,
                layers=[one for one in layers if one[1]],
                image=image,
                open=open_,
                spread=[_spread(one) for one in report.results if one.over_seeds],
                parts=PARTS,
                models=_models(report),
                headings=HEADINGS,
                confidence=f"{100 * CONFIDENCE:.0f} %",
            ),
            encoding="utf-8",
        )
    return path


def _models(report: AuditFindings) -> dict[str, str]:
    """Who is who; retrained models on one line. Models that were passed as objects have no names but their roles."""
    found: dict[str, list[str]] = {}
    for role, name in report.models.items():
        found.setdefault(role.split()[0], []).append(name)
    return {
        role: (f"{len(names)} models" if len(names) > 1 else "a model") + " without a name"
        if set(names) == {role}
        else ", ".join(names)
        for role, names in found.items()
    }


def _row(one: CheckResult) -> dict[str, Any]:
    """A check's line: what it is called, and by heading a value and what stands below it."""
    mean = sum(one.retrained) / len(one.retrained) if one.retrained else None
    spread = f"{one.shown(min(one.retrained))} … {one.shown(max(one.retrained))}" if len(one.retrained) > 1 else ""
    interval = "" if one.low is None else f"{one.shown(one.low, signed=True)} … {one.shown(one.high, signed=True)}"
    cells = (
        (one.shown(one.audited), ""),
        (one.shown(one.original), ""),
        (one.shown(mean), spread),
        (one.shown(one.distance, signed=True), interval),
        (one.shown(one.margin), "" if one.layer == "beside" else f"stated {one.shown(one.stated)}"),
        (f"{one.n:,}", ""),
        (one.status, ""),
    )
    return {"title": one.title, "what": one.what, "paper": one.paper, "cells": list(zip(HEADINGS, cells, strict=True))}


def _spread(one: CheckResult) -> dict[str, Any]:
    """A check's line over training seeds: the mean of one audit, its standard deviation, and the shares of its variance."""
    found = one.over_seeds
    whole = sum(found[part] for part in PARTS)
    shares = [f"{100 * (found[part] / whole):.0f} %" if whole else "–" for part in PARTS]
    return {"title": one.title, "cells": [one.shown(found["mean"]), one.shown(found["sd"]), *shares]}


def _bar(one: CheckResult) -> plots.AuditBar:
    """In units of the margin, which all checks have in common."""
    if one.margin is None:
        return plots.AuditBar(one.title, one.status, None, None, None, None)
    margin = max(one.margin, 1e-12)
    mean = sum(one.retrained) / len(one.retrained) if one.retrained else 0.0
    original = None if one.original is None else (one.original - mean) / margin
    return plots.AuditBar(one.title, one.status, one.distance / margin, one.low / margin, one.high / margin, original)


def _curves(results: Sequence[CheckResult]) -> dict[str, dict[str, tuple[Sequence[float], Sequence[float]]]]:
    """Of the checks that have one: by model, steps and values."""
    found = {}
    for one in results:
        if "curve" not in one.readings.audited.figures:
            continue
        models = {"audited": one.readings.audited} | (
            {"original": one.readings.original} if one.readings.original else {}
        )
        models |= {f"retrained {number + 1}": reading for number, reading in enumerate(one.readings.retrained)}
        found[one.title] = {
            name: (reading.figures["steps"], reading.figures["curve"]) for name, reading in models.items()
        }
    return found
