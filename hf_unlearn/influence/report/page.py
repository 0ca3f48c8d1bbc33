"""An influence report as one page that needs no other file: the examples at both ends, with their pictures, or their texts and which tokens taught."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ...data import value_name
from ...files import kept_private
from ...images import data_uri
from .tokens import TokenScores, tokens_in
from .unit import said_of, signed


if TYPE_CHECKING:
    from datasets import Dataset

    from .observations import Observations


TEMPLATE = Path(__file__).with_name("page.html.jinja")
TITLES = "Taught it most", "Harmed it most"
OWN_TITLES = "Learned by heart most", "Learned by heart least"  # target "self"
LONG = 40  # characters: what is longer is a text, and stands beside the numbers


class Pageable(Protocol):
    """What the page asks of a report."""

    dataset: Dataset
    observations: Observations
    manifest: dict[str, Any]
    token_rows: Dataset | None
    _joined: list[str]

    def top(self, k: int, target: str | None = None, harmful: bool = False) -> Dataset: ...


def page(report: Pageable, path: str | Path, targets: Sequence[str], k: int) -> Path:
    """Writes it."""
    from jinja2 import Environment

    number = len(report.observations.sample_ids)
    half = min(k, -(-number // 2))  # no example is shown twice
    found = []
    for name in targets:
        rows = report.top(half, name), _worst(report, name, min(k, number - half))
        ends = zip(OWN_TITLES if name == "self" else TITLES, rows, strict=True)
        found.append(
            {
                "name": name,
                "ends": [(title, [_row(report, row, name) for row in some]) for title, some in ends if some],
            }
        )
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        run=report.manifest.get("run_id", "?"),
        examples=f"{number:,}",
        observed=f"seen by {report.manifest.get('observation', '?')!r}",
        said=f"μ > 0 helps, < 0 harms. {said_of(report.manifest)}.",
        shaded=report.token_rows is not None,
        targets=found,
    )
    with kept_private(path) as path:
        path.write_text(text, encoding="utf-8")
    return path


def _worst(report: Pageable, target: str, k: int) -> Iterable[dict[str, Any]]:
    return report.top(k, target, harmful=True) if k else []


def _row(report: Pageable, row: Mapping[str, Any], target: str) -> dict[str, Any]:
    """What the page says of an example."""
    features = report.dataset.features
    columns, texts, images = [], [], []
    for name in report._joined:
        value = row[name]
        if hasattr(value, "save"):
            images.append(data_uri(value))
        elif (text := _text(value, features[name])) and ("\n" in text or len(text) > LONG):
            texts.append(text)
        elif text:
            columns.append((name, text))
    try:
        tokens = _shaded(tokens_in(report.token_rows, row["sample_id"], target))
    except ValueError:
        tokens = []
    low, high = (signed(row[name]) for name in ("mu_low", "mu_high"))
    return {
        "sample": row["sample_id"], "mu": signed(row["mu"]), "interval": f"{low} … {high}" if "–" not in (low, high) else "",
        "columns": columns, "text": "\n\n".join(texts), "images": images, "tokens": tokens,
    }  # fmt: skip


def _shaded(tokens: TokenScores) -> list[tuple[str, int, str]]:
    """Pieces, how dark each is in percent, and its score in words; nothing where nothing is predicted."""
    strongest = float(np.nanmax(np.abs(tokens.scores), initial=0.0)) or 1.0
    return [
        (piece, 0, "") if math.isnan(score) else (piece, round(100 * abs(score) / strongest), signed(score))
        for piece, score in zip(tokens.pieces, tokens.scores.tolist(), strict=True)
    ]


def _text(value: Any, feature: Any) -> str:
    """A text, or a conversation turn by turn."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "content" in turn for turn in value):
        return "\n".join(f"{turn.get('role', '?')}: {turn['content']}" for turn in value)
    return "" if value is None else value_name(value, feature)
