"""Every picture. Functions take numbers and write PNG files; matplotlib is used without a display."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


COLOURS = {"original": "#9aa5b1", "unlearned": "#d9480f", "retrained": "#1c7ed6"}
OTHER_COLOURS = ("#2b8a3e", "#862e9c", "#5c940d", "#c2255c", "#0b7285", "#e67700")


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


def _write(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    return path
