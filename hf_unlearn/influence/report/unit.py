"""Whether a report's μ has a unit, what it is called, and how well it is known: the one place that knows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import ndtri


ORDER_ONLY = "order_only"  # key of a manifest: why there is no unit
UNITS = {
    "in_run": "standard deviations of the target's loss over trainings, measured by the calibration runs",
    "propagated": "standard deviations of the target's loss over trainings",
    "segments": "standard deviations of the target's loss over trainings",
}
OF_THEMSELVES = "every example is its own target, and all of them share one σ"
NOT_CALIBRATED = "in_run does not see how much of a gain is left in the end; n_calibration_runs measures it"
# Standard deviations of log(μ / true μ), and of μ itself, beside the noise of the estimate: the narrowest that cover on twelve tasks, see
# benchmarks/influence_units.py.
WIDTHS = {"propagated": (0.35, 0.0), "in_run": (0.55, 0.4)}


def why_order_only(manifest: Mapping[str, Any]) -> str | None:
    """Why a report orders examples and nothing more; None where μ has a unit."""
    if why := manifest.get(ORDER_ONLY):
        return why
    if manifest.get("observation") in UNITS and manifest.get("targets") == ["self"]:
        return OF_THEMSELVES
    return NOT_CALIBRATED if manifest.get("observation") == "in_run" and "gain" not in manifest else None


def unit_of(manifest: Mapping[str, Any]) -> str:
    """What μ is measured in."""
    if why := why_order_only(manifest):
        return f"no unit: order only, since {why}"
    return UNITS.get(manifest.get("observation"), "standard deviations")


def said_of(manifest: Mapping[str, Any]) -> str:
    """The same as a sentence's beginning."""
    return f"μ {'has' if why_order_only(manifest) else 'is in'} {unit_of(manifest)}"


def gain_of(manifest: Mapping[str, Any]) -> float:
    """What signals are multiplied by, as the calibration runs found; 1 without them."""
    return manifest.get("gain", 1.0)


def widened(
    mu: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    manifest: Mapping[str, Any],
    confidence: float,
    *,
    widths: tuple[float, float] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds that cover the true μ, from bounds that cover the noise of its estimate: with what first order, σ and a single run get
    wrong, a share of μ and a little beside. Left as they are where there is no unit.

    Args:
        mu, low, high (array of `float`): of one shape.
        manifest (`Mapping`): of the run; calibration runs add `unit_error`, the relative error of their own measurement.
        confidence (`float`): of both.
        widths (`tuple[float, float]`, *optional*): standard deviations of log(μ / true μ), and of μ; those of the observation.
    """
    widths = widths or WIDTHS.get(manifest.get("observation"))
    if why_order_only(manifest) or widths is None:
        return low, high
    z = ndtri(0.5 + confidence / 2)
    relative = np.hypot(widths[0], manifest.get("unit_error", 0.0))
    # μ·exp(±z·relative): away from 0 it may be off by more than towards it.
    out, back = np.abs(mu) * np.expm1(z * relative), -np.abs(mu) * np.expm1(-z * relative)
    below, above = np.where(mu < 0, out, back), np.where(mu < 0, back, out)
    beside = z * widths[1]
    return (
        mu - np.sqrt((mu - low) ** 2 + below**2 + beside**2),
        mu + np.sqrt((high - mu) ** 2 + above**2 + beside**2),
    )


def signed(value: float, digits: str = ".3g") -> str:
    """μ as it is shown."""
    return "–" if math.isnan(value) else f"{value:+{digits}}"
