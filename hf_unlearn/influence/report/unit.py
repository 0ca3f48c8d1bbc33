"""Whether a report's μ has a unit, and what it is called: the one place that knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


ORDER_ONLY = "order_only"  # key of a manifest: why there is no unit
UNITS = {
    "in_run": "standard deviations of the gains that were seen, a unit of this run alone",
    "propagated": "standard deviations of the target's loss over trainings",
    "segments": "standard deviations of the target's loss over trainings",
}


def why_order_only(manifest: Mapping[str, Any]) -> str | None:
    """Why a report orders examples and nothing more; None where μ has a unit."""
    return manifest.get(ORDER_ONLY)


def unit_of(manifest: Mapping[str, Any]) -> str:
    """What μ is measured in."""
    if why := why_order_only(manifest):
        return f"no unit: order only, since {why}"
    return UNITS.get(manifest.get("observation"), "standard deviations")


def said_of(manifest: Mapping[str, Any]) -> str:
    """The same as a sentence's beginning."""
    return f"μ {'has' if why_order_only(manifest) else 'is in'} {unit_of(manifest)}"
