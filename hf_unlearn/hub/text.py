"""Text of others, such as labels and file names, that is told in a card and stays text there."""

from __future__ import annotations

import re


_MARKUP = re.compile(r"([\\`*\[\]<>|&$~])")


def line(text: object) -> str:
    """Text that stays in one line and one table cell, and whose signs are no markup."""
    return " ".join(_MARKUP.sub(r"\\\1", str(text)).split())


def shown(value: float | None, unit: str) -> str:
    """A figure with its unit; "–" where there is none."""
    if value is None:
        return "–"
    return f"{value:.2f} {unit}" if unit else f"{value:.4g}"
