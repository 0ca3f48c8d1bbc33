"""Every picture. Functions take numbers and write PNG files; matplotlib is used without a display."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.special import ndtr

from .files import kept_private


COLOURS = {"original": "#9aa5b1", "unlearned": "#d9480f", "retrained": "#1c7ed6"}
OTHER_COLOURS = ("#2b8a3e", "#862e9c", "#5c940d", "#c2255c", "#0b7285", "#e67700")
HELPS, HARMS, MARKED, BAND = "#1c7ed6", "#d9480f", "#862e9c", "#dee2e6"
READABLE = 60  # more examples than this are drawn as a line


def per_class_bars(
    accuracy: Mapping[str, Sequence[float]], class_names: Sequence[str], forgotten: Collection[int], path: str | Path
) -> Path:
    """Accuracy of each class as bars, one colour a model; the forgotten classes are shaded.

    Args:
        accuracy (`Mapping[str, Sequence[float]]`): by model name, `[classes]` in [0, 1].
        class_names (`Sequence[str]`): `[classes]`.
        forgotten (`Collection[int]`): indices of the forgotten classes.
        path: where the PNG goes.
    """
    figure = Figure(figsize=(1.6 + 0.75 * len(class_names), 3.4), layout="constrained")
    axes = figure.subplots()
    positions, width = np.arange(len(class_names)), 0.8 / len(accuracy)
    for index in forgotten:
        axes.axvspan(index - 0.5, index + 0.5, color="#fff3bf", zorder=0)
    for offset, (name, values) in enumerate(accuracy.items()):
        colour = COLOURS.get(name, OTHER_COLOURS[offset % len(OTHER_COLOURS)])
        heights = 100 * np.asarray(values)
        bars = axes.bar(positions - 0.4 + (offset + 0.5) * width, heights, width, label=name, color=colour, zorder=2)
        for bar, index in zip(bars, positions, strict=True):
            if index in forgotten and heights[index] < 2:  # a bar of no height should not look like a missing one
                axes.annotate(
                    f"{heights[index]:.0f}", (bar.get_x() + width / 2, 1), ha="center", fontsize=7, color=colour
                )
    axes.set(xticks=positions, xticklabels=class_names, ylim=(0, 104), xlim=(-0.6, len(class_names) - 0.4))
    axes.set_xlabel("class (shaded: forgotten)")
    axes.set_ylabel("test accuracy, %")
    axes.grid(axis="y", color="#e9ecef", zorder=1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(accuracy), frameon=False)
    return _write(figure, path)


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: str | Path,
    *,
    x_label: str,
    y_label: str,
    levels: Mapping[str, float] | None = None,
    log_x: bool = False,
) -> Path:
    """Lines over a common axis, with named horizontal levels for comparison.

    Args:
        series: by name, x and y values of the same length.
        path: where the PNG goes.
        x_label, y_label (`str`): with units.
        levels (`Mapping[str, float]`, *optional*): dashed horizontal lines.
        log_x (`bool`, defaults to `False`): logarithmic x axis.
    """
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, (x, y)), colour in zip(series.items(), ("#d9480f", *OTHER_COLOURS), strict=False):
        axes.plot(x, y, marker="o", markersize=3, label=name, color=colour)
    for (name, level), colour in zip((levels or {}).items(), ("#868e96", "#1c7ed6", "#adb5bd"), strict=False):
        axes.axhline(level, linestyle="--", linewidth=1, color=colour, label=name)
    if log_x:
        axes.set_xscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color="#e9ecef")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return _write(figure, path)


def tradeoff_curve(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: str | Path,
    *,
    mu: Mapping[str, float] | None = None,
) -> Path:
    """Trade-off curves, each with the Gaussian one of its μ as a dashed line; on the diagonal nothing is told apart.

    Args:
        curves: by name, type-I errors and type-II errors, `[points]` each, in [0, 1].
        path: where the PNG goes.
        mu (`Mapping[str, float]`, *optional*): of the Gaussian curves, by name; NaN for none.
    """
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [1, 0], color="#adb5bd", linewidth=1, zorder=1)
    threshold = np.linspace(-6, 12, 400)
    for (name, (alpha, beta)), colour in zip(curves.items(), cycle((HELPS, HARMS, *OTHER_COLOURS))):
        value = (mu or {}).get(name, np.nan)
        label = name if np.isnan(value) else f"{name}, μ = {value:+.2g}"
        axes.plot(alpha, beta, color=colour, linewidth=1.6, label=label, zorder=3)
        if not np.isnan(value):
            fit = ndtr(-threshold), ndtr(threshold - min(abs(value), 6))
            axes.plot(*fit, color=colour, linewidth=1, linestyle="--", zorder=2)
    if mu:
        axes.plot([], [], color="#868e96", linewidth=1, linestyle="--", label="Gaussian with that μ")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_xlabel("type-I error α")
    axes.set_ylabel("type-II error T(α)")
    axes.grid(color="#e9ecef", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return _write(figure, path)


def ranked_mu(
    mu: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    path: str | Path,
    *,
    highlight: Sequence[bool] | None = None,
    highlight_label: str = "highlighted",
    label: str = "",
    confidence: float = 0.95,
) -> Path:
    """μ of all examples by rank, the most helpful first, with intervals; highlighted examples are marked.

    Up to 60 examples have a bar each. Of more the band is the median interval of neighbouring ranks, and a row of
    ticks below says where the highlighted ones are. The axis shows all of μ; intervals may go beyond it.

    Args:
        mu, low, high (`Sequence[float]`): `[examples]`; NaN where unknown. Examples without μ are left out.
        path: where the PNG goes.
        highlight (`Sequence[bool]`, *optional*): `[examples]`.
        highlight_label (`str`), label (`str`): legend of the highlighted ones, and what the influence is on.
        confidence (`float`, defaults to 0.95): of the intervals, for the legend.

    Raises:
        ValueError: no example has a μ.
    """
    mu, low, high = (np.asarray(values, dtype=float) for values in (mu, low, high))
    marked = np.zeros(len(mu), dtype=bool) if highlight is None else np.asarray(highlight, dtype=bool)
    order = np.argsort(-mu, kind="stable")
    order = order[np.isfinite(mu[order])]
    if not len(order):
        raise ValueError("mu: no example has one; nothing was observed")
    mu, low, high, marked = mu[order], low[order], high[order], marked[order]
    rank = np.arange(1, len(mu) + 1)
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="#868e96", linewidth=1, zorder=1)
    interval = f"{100 * confidence:.0f} % interval"
    few, shown = len(mu) <= READABLE, (low, high)
    if few:
        known = np.isfinite(low) & np.isfinite(high)
        axes.vlines(rank[known], low[known], high[known], color="#adb5bd", linewidth=2, label=interval, zorder=2)
        for sign, colour in ((mu >= 0, HELPS), (mu < 0, HARMS)):
            axes.scatter(rank[sign & ~marked], mu[sign & ~marked], s=18, color=colour, zorder=3)
    elif np.isfinite(low).any():
        window = max(9, len(mu) // 100)
        shown = [_running_median(bound, window) for bound in (low, high)]
        axes.fill_between(rank, *shown, color=BAND, linewidth=0, label=f"{interval}, median of neighbours", zorder=2)
    if not few:
        for sign, colour in ((mu >= 0, HELPS), (mu <= 0, HARMS)):
            axes.plot(rank[sign], mu[sign], color=colour, linewidth=1.8, zorder=3)
    if marked.any():
        size = 24 if few else 10
        axes.scatter(rank[marked], mu[marked], s=size, color=MARKED, label=highlight_label, zorder=4, linewidth=0)
    bottom, top = min(mu.min(), 0), max(mu.max(), 0)
    if np.isfinite(low).any():
        room = 2 * (top - bottom)  # intervals from two or three observations would press μ flat
        bottom = min(bottom, max(np.nanmin(shown[0]), bottom - room))
        top = max(top, min(np.nanmax(shown[1]), top + room))
    margin = 0.08 * max(top - bottom, 1e-9)
    axes.set(xlim=(1 - 0.02 * len(mu), 1.02 * len(mu) + 0.5), ylim=(bottom - margin, top + margin))
    if marked.any() and not few:
        ends = np.full(marked.sum(), bottom - margin), np.full(marked.sum(), bottom - 0.45 * margin)
        axes.vlines(rank[marked], *ends, color=MARKED, linewidth=0.6, zorder=3)
    axes.set_xlabel("rank of the example")
    axes.set_ylabel(f"μ {label}".strip() + "\n(> 0 helps, < 0 harms)")
    axes.grid(axis="y", color="#e9ecef", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="upper right")
    return _write(figure, path)


def group_bars(
    names: Sequence[str],
    mu: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    path: str | Path,
    *,
    label: str = "",
) -> Path:
    """μ of groups as horizontal bars with intervals, the first group on top.

    Args:
        names (`Sequence[str]`): `[groups]`; long ones are cut.
        mu, low, high (`Sequence[float]`): `[groups]`; NaN where unknown.
        path: where the PNG goes.
        label (`str`): what the influence is on.
    """
    mu, low, high = (np.asarray(values, dtype=float) for values in (mu, low, high))
    places = np.arange(len(mu))
    figure = Figure(figsize=(6.4, 1.1 + 0.3 * max(len(mu), 2)), layout="constrained")
    axes = figure.subplots()
    axes.barh(places, np.nan_to_num(mu), 0.7, color=np.where(mu >= 0, HELPS, HARMS).tolist(), zorder=2)
    axes.hlines(places, low, high, color="#343a40", linewidth=1.4, zorder=3)
    for place in places[~np.isfinite(mu)]:
        axes.annotate(" not seen", (0, place), va="center", fontsize=8, color="#868e96")
    axes.axvline(0, color="#868e96", linewidth=1, zorder=3)
    shortened = [name if len(name) <= 32 else name[:31] + "…" for name in map(str, names)]
    axes.set(yticks=places, yticklabels=shortened, ylim=(len(mu) - 0.4, -0.6))
    axes.set_xlabel(f"μ {label}".strip() + " (> 0 helps, < 0 harms)")
    axes.grid(axis="x", color="#e9ecef", zorder=1)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return _write(figure, path)


def image_grid(images: Sequence[Any], captions: Sequence[str], path: str | Path, *, columns: int = 6) -> Path:
    """Pictures in rows with a caption under each.

    Args:
        images: `[n]` PIL images, or arrays `[n, H, W]` (grey) or `[n, H, W, 3 or 4]`; integers up to 255, floats up
            to 1. Grey float arrays with other values are stretched from their least to their largest.
        captions (`Sequence[str]`): `[n]`.
        path: where the PNG goes.
        columns (`int`, defaults to 6): pictures in a row.

    Raises:
        ValueError: no images, or not as many captions.
    """
    if not len(images) or len(images) != len(captions):
        raise ValueError(f"images, captions: {len(images)} and {len(captions)}; must be as many, at least one")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    lines = max(caption.count("\n") + 1 for caption in captions)
    figure = Figure(figsize=(1.3 * columns + 0.2, rows * (1.25 + 0.14 * lines) + 0.1), layout="constrained")
    for axes in (grid := figure.subplots(rows, columns, squeeze=False).ravel()):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, image, caption in zip(grid, images, captions, strict=False):
        pixels = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
        if pixels.ndim == 3 and pixels.shape[-1] == 1:
            pixels = pixels[..., 0]
        whole = np.issubdtype(pixels.dtype, np.integer)
        limits = {"vmin": 0, "vmax": 255 if whole else 1} if whole or 0 <= pixels.min() <= pixels.max() <= 1 else {}
        axes.imshow(pixels, cmap="gray", interpolation="nearest", **limits)
        axes.set_xlabel(caption, fontsize=7)
    return _write(figure, path)


@dataclass(frozen=True)
class AuditBar:
    """A check of an audit, in units of its margin; None where there is nothing to compare with.

    Args:
        name (`str`), status (`str`): what it is called, and what came out.
        distance, low, high (`float`, *optional*): of the audited model from retrained ones.
        original (`float`, *optional*): of the original.
    """

    name: str
    status: str
    distance: float | None
    low: float | None
    high: float | None
    original: float | None


STATUS_COLOURS = {
    "beyond": "#c92a2a",
    "within": "#2b8a3e",
    "unclear": "#e67700",
    "blind": "#fab005",
    "unknown": "#868e96",
}
FARTHEST = 6.0  # margins that are drawn; what is farther stands at the edge


def audit_page(
    bars: Sequence[AuditBar],
    recovery: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    path: str | Path,
    *,
    title: str = "",
) -> Path:
    """An audit on one page: every check's distance from retrained models in units of its margin, and below recovery over steps.

    Args:
        bars (`Sequence[AuditBar]`): the first one on top.
        recovery: by check and model (`"audited"`, `"original"`, others are retrained ones), steps and shares in [0, 1].
        path: where the PNG goes.
        title (`str`): above.
    """
    tall, columns = 0.7 + 0.26 * len(bars), max(1, len(recovery))
    figure = Figure(figsize=(8.6, tall + (2.6 if recovery else 0)), layout="constrained")
    top, *below = figure.subfigures(2, 1, height_ratios=[tall, 2.6]) if recovery else [figure]
    axes = top.subplots()
    lowest = min((bar.low for bar in bars if bar.low is not None), default=0.0)
    left = max(-FARTHEST, min(-1.0, lowest - 0.2))
    axes.axvspan(left - 0.3, 1, color="#ebfbee", zorder=0)
    axes.axvline(1, color="#2b8a3e", linewidth=1, linestyle="--", label="margin", zorder=1)
    axes.axvline(0, color=COLOURS["retrained"], linewidth=1, label="retrained, mean", zorder=1)
    for place, bar in enumerate(bars):
        colour = STATUS_COLOURS[bar.status]
        if bar.distance is None:
            axes.annotate(bar.status, (0.1, place), va="center", fontsize=7, color=colour)
            continue
        ends = np.clip([bar.low, bar.high], left, FARTHEST)
        axes.hlines(place, *ends, color=colour, linewidth=2.4, zorder=3)
        axes.scatter(np.clip(bar.distance, left, FARTHEST), place, s=26, color=colour, zorder=4)
        if bar.original is not None:
            axes.scatter(np.clip(bar.original, left, FARTHEST), place, s=24, marker="x", color="#868e96", zorder=2)
    axes.set(yticks=range(len(bars)), yticklabels=[bar.name for bar in bars], ylim=(len(bars) - 0.4, -0.6))
    axes.set(xlim=(left - 0.3, FARTHEST + 0.3))
    axes.set_xlabel("distance from retrained models, in margins (at the edge: farther)", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", color="#e9ecef", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    if any(bar.original is not None for bar in bars):
        axes.scatter([], [], s=24, marker="x", color="#868e96", label="original")
    for status in dict.fromkeys(bar.status for bar in bars if bar.distance is not None):
        axes.scatter([], [], s=26, color=STATUS_COLOURS[status], label=status)
    above = {
        "loc": "lower right",
        "bbox_to_anchor": (1.01, 1.0),
        "borderaxespad": 0.2,
        "columnspacing": 1.2,
        "handletextpad": 0.4,
    }
    axes.legend(frameon=False, fontsize=7, ncols=8, **above)
    top.suptitle(title, x=0.01, ha="left", fontsize=10)
    for panel, (name, models) in zip(
        below[0].subplots(1, columns, sharey=True, squeeze=False)[0] if below else (), recovery.items(), strict=True
    ):
        seen = set()
        for model, (steps, values) in models.items():
            kind = {"audited": "unlearned", "original": "original"}.get(model, "retrained")
            label = None if kind in seen else {"unlearned": "audited"}.get(kind, kind)
            seen.add(kind)
            width = 1.8 if kind == "unlearned" else 1.0
            panel.plot(
                steps,
                100 * np.asarray(values),
                color=COLOURS[kind],
                linewidth=width,
                label=label,
                zorder=3 if kind == "unlearned" else 2,
            )
        panel.set_title(name, fontsize=8)
        panel.set_xlabel("steps", fontsize=8)
        panel.set_ylim(-3, 103)
        panel.tick_params(labelsize=7)
        panel.grid(color="#e9ecef")
        panel.spines[["top", "right"]].set_visible(False)
    if below:
        below[0].axes[0].set_ylabel("known of the forgotten, %", fontsize=8)
        below[0].axes[0].legend(frameon=False, fontsize=7)
    return _write(figure, path)


def _running_median(values: np.ndarray, window: int) -> np.ndarray:
    """Median of the known values among `window` neighbours; NaN where none is known."""
    padded = np.pad(values, (window // 2, (window - 1) // 2), constant_values=np.nan)
    neighbours = np.lib.stride_tricks.sliding_window_view(padded, window)
    with warnings.catch_warnings(action="ignore"):  # of windows without a known value
        return np.nanmedian(neighbours, axis=1)


def _write(figure: Figure, path: str | Path) -> Path:
    powers = {
        text for axes in figure.axes if axes.get_xscale() == "log" for text in axes.get_xticklabels(which="both")
    }
    for text in set(figure.findobj(Text)) - powers:
        text.set_parse_math(False)  # names are anybody's, and may hold a $
    with kept_private(path) as path:
        figure.savefig(path, dpi=140)
    return path
