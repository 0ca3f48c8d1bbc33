"""One page that shows the run: no other file, no network; light and dark, for a desk and for a phone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict
from jinja2 import Environment

from hf_unlearn.audit.report import AuditReport
from hf_unlearn.hub.provenance import library_versions
from hf_unlearn.images import data_uri

from .filtering import LOOKED_AT, Filtered
from .find import Found
from .forget import Corrected, Forgotten
from .publishing import Published
from .stage import Stage


TEMPLATE = Path(__file__).with_name("report.html.jinja")
MODELS = {"original": "before", "unlearned": "after", "retrained": "retrained without it"}
PLACES = {
    "original": "the classifier that learned from wrong labels",
    "corrected": "it, when the wrong answers are forgotten",
    "unlearned": "that, when a whole class is forgotten: model, card",
    "retrained": "classifiers trained from scratch without the suspects, or without the class, to compare with",
    "audit": "audit.html, audit.json, audit.png",
    "gan": "the small GAN",
}
FURTHEST = 3.0  # margins that a check's line shows; what is further stands at its end


@dataclass(frozen=True)
class Card:
    """One number of the run: what was done, what came out, and of what it is."""

    verb: str
    number: str
    words: str


def write(
    path: Path,
    stage: Stage,
    splits: DatasetDict,
    found: Found,
    corrected: Corrected,
    forgotten: Forgotten,
    report: AuditReport,
    filtered: Filtered,
    published: Published,
    cards: list[Card],
) -> Path:
    """The page, at `path`."""
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    digits = dict(zip(splits["train"]["id"], splits["train"]["label"], strict=True))
    text = template.render(
        stage=stage,
        cards=cards,
        found=found,
        suspects=suspects(found, digits),
        corrected=corrected,
        answered=answered(found, corrected, digits),
        forgotten=forgotten,
        report=report,
        checks=checks(report),
        filtered=filtered,
        looked_at=LOOKED_AT,
        drawn=drawn(filtered),
        published=published,
        models=MODELS,
        places=PLACES,
        versions=library_versions(),
    )
    path.write_text(text, encoding="utf-8")
    return path


def measured(
    stage: Stage,
    found: Found,
    corrected: Corrected,
    forgotten: Forgotten,
    report: AuditReport,
    filtered: Filtered,
    published: Published,
) -> list[Card]:
    """The run in six numbers."""
    digit, planted, rows = stage.forgotten, len(found.suspects), len(found.train)
    before, after = (corrected.answers[name].wrong for name in ("original", "unlearned"))
    (was, others_were), (is_now, others_are) = (forgotten.on(name, digit) for name in ("original", "unlearned"))
    lines = checks(report)
    within = sum(one["status"] == "within" for one in lines)
    return [
        Card("Find", f"{found.hits} of {planted}", f"wrong labels are among the {planted} most suspicious of {rows:,} images; by chance {planted**2 / rows:.1f}"),
        Card("Forget answers", f"{before} → {after}", f"of {planted} mislabelled images are called by their wrong label"),
        Card("Forget a class", f"{100 * was:.1f} % → {100 * is_now:.1f} %", f"right answers on the digit {digit}; on the others {100 * others_were:.1f} % → {100 * others_are:.1f} %"),
        Card("Verify", report.verdict.word, f"{within} of {len(lines)} checks find no more than in models that never saw it"),
        Card("Filter", f"{100 * filtered.share_before:.1f} % → {100 * filtered.share_after:.1f} %", f"of a generator's samples show a {digit}, after {filtered.marks} marks"),
        Card("Publish", f"{published.same['answers']} of {published.same['asked']}", "answers are the same from a new process that loads it with stock classes"),
    ]  # fmt: skip


def suspects(found: Found, digits: dict[int, int]) -> list[dict[str, Any]]:
    """The most suspicious images: what they are labelled as, and what they are."""
    return [
        {
            "image": data_uri(row["image"]),
            "label": row["label"],
            "digit": digits[row["id"]],
            "wrong": row["wrong"],
            "mu": row["mu"],
        }
        for row in found.suspects
    ]


def answered(found: Found, corrected: Corrected, digits: dict[int, int]) -> list[dict[str, Any]]:
    """The images with wrong labels: what is said of them before and after, and whether they were found."""
    planted = [row for row in found.train if row["wrong"]]
    suspected = set(found.suspects["id"])
    return [
        {
            "image": data_uri(row["image"]), "label": row["label"], "digit": digits[row["id"]],
            "before": corrected.answers["original"].said[place], "after": corrected.answers["unlearned"].said[place],
            "found": row["id"] in suspected,
        }
        for place, row in enumerate(planted)
    ]  # fmt: skip


def drawn(filtered: Filtered) -> list[dict[str, Any]]:
    """What is shown of the generator: a sample before and after the filter, and what it is."""
    return [
        {"before": data_uri(before), "after": data_uri(after), "blocked": blocked, "undesired": undesired}
        for before, after, blocked, undesired in zip(
            filtered.before, filtered.after, filtered.blocked, filtered.undesired, strict=True
        )
    ]


def checks(report: AuditReport) -> list[dict[str, Any]]:
    """What decides the verdict, each on a line on which 1 is its margin."""
    lines = [
        {
            "title": one.title, "what": one.what, "status": one.status,
            "audited": one.shown(one.audited), "retrained": one.shown(float(np.mean(one.retrained))),
            "original": one.shown(one.original),
            **on_a_line(one.distance, one.low, one.high, one.original - float(np.mean(one.retrained)), one.margin),
        }
        for one in report.results
        if one.layer != "beside" and one.margin
    ]  # fmt: skip
    residual = report.residual
    if residual.margin:
        lines.append(
            {
                "title": "Residual μ", "what": "How well its loss on the forgotten images is told from that of retrained models: standard deviations between trainings.",
                "status": residual.status, "audited": f"{residual.mu:+.1f}", "retrained": "0", "original": f"{residual.original:+.1f}",
                **on_a_line(residual.mu, residual.low, residual.high, residual.original, residual.margin),
            }
        )  # fmt: skip
    return lines


def on_a_line(value: float, low: float, high: float, original: float, margin: float) -> dict[str, float]:
    """Places in percent of the line, which goes from one margin below retrained models to [`FURTHEST`] above."""

    def place(distance: float) -> float:
        return round(100 * (min(max(distance / margin, -1), FURTHEST) + 1) / (FURTHEST + 1), 1)

    return {
        "dot": place(value), "from": place(low), "to": place(high), "before": place(original), "allowed": place(margin),
        "middle": place(0.0),
    }  # fmt: skip
