"""Text of others, such as labels and file names, that is told in a card and stays text there."""

from __future__ import annotations

import re
from collections.abc import Iterable


_MARKUP = re.compile(r"([\\`*\[\]<>|&$~])")


def line(text: object) -> str:
    """Text that stays in one line and one table cell, and whose signs are no markup."""
    return " ".join(_MARKUP.sub(r"\\\1", str(text)).split())


def one_line(text: object) -> str:
    """Text for metadata. YAML takes some signs for line breaks that it then writes otherwise."""
    return " ".join(str(text).split())


def all_tags(*groups: str | Iterable[str]) -> list[str]:
    """Tags, each once and none empty."""
    every = [one_line(tag) for group in groups for tag in ((group,) if isinstance(group, str) else group)]
    return list(dict.fromkeys(filter(None, every)))


def shown(value: float | None, unit: str) -> str:
    """A figure with its unit; "–" where there is none."""
    if value is None:
        return "–"
    return f"{value:.2f} {unit}" if unit else f"{value:.4g}"
