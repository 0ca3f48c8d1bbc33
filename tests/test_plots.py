"""Pictures are judged by their pixels: what has which colour, and where."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageColor

from hf_unlearn.plots import (
    COLOURS,
    HARMS,
    HELPS,
    MARKED,
    curves,
    group_bars,
    image_grid,
    per_class_bars,
    ranked_mu,
    tradeoff_curve,
)


SHADE = "#fff3bf"


def pixels(path):
    """`[height, width, 3]`, of a file whose header says that it is a PNG of that size."""
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    image = np.asarray(Image.open(path).convert("RGB"))
    assert image.shape == (height, width, 3)
    return image


def count(image, colour, tolerance=0, axis=0):
    """Pixels of that colour, by column."""
    return (np.abs(image.astype(int) - ImageColor.getrgb(colour)) <= tolerance).all(-1).sum(axis)


def test_bars_of_every_model_and_the_forgotten_class_shaded(tmp_path):
    series = {"original": [0.9, 0.8, 1.0, 0.7], "unlearned": [0.9, 0.8, 0.0, 0.7], "retrained": [0.9, 0.8, 0.0, 0.7]}
    path = per_class_bars(series, ["a", "b", "c", "d"], [2], tmp_path / "new" / "folder" / "bars.png")
    assert path == tmp_path / "new" / "folder" / "bars.png"
    image = pixels(path)
    assert image.shape[:2] == (round(3.4 * 140), round((1.6 + 0.75 * 4) * 140))
    shaded = np.flatnonzero(count(image, SHADE) > 20)
    assert 0.55 < (shaded.min() + shaded.max()) / 2 / image.shape[1] < 0.75  # the third of four
    assert all(count(image, colour).sum() > 500 for colour in COLOURS.values())
    # Nothing forgotten; classes without examples; more models than have a colour of their own.
    more = {f"model {i}": [0.5, float("nan")] for i in range(4)}
    assert count(pixels(per_class_bars(more, ["a", "b"], [], tmp_path / "bars.png")), SHADE).sum() == 0


def test_names_are_no_mathematics(tmp_path):
    """They are anybody's: a $ is drawn as one, and what would be broken mathematics too."""
    name = "$5 and \\frac{$"
    per_class_bars({name: [0.5]}, [name], [0], tmp_path / "bars.png")
    tradeoff_curve({name: ([0, 1], [1, 0])}, tmp_path / "curve.png")
    curves({name: ([1, 100], [1, 0])}, tmp_path / "log.png", x_label=name, y_label=name, log_x=True)
    group_bars([name], np.array([1.0]), np.array([0.5]), np.array([1.5]), tmp_path / "groups.png", label=name)


def test_taller_bars_for_higher_accuracy(tmp_path):
    heights = [
        count(pixels(per_class_bars({"original": [value]}, ["a"], [], tmp_path / "a.png")), COLOURS["original"]).max()
        for value in (0.25, 0.5, 0.75)
    ]  # beside a patch of the legend
    assert heights[2] - heights[1] == pytest.approx(heights[1] - heights[0], abs=2)
    assert heights[1] - heights[0] > 50


def test_curves(tmp_path):
    series = {"ours": ([1, 10, 100], [0.9, 0.8, 0.7]), "paper": ([1, 10, 100], [0.9, 0.2, 0.1])}
    labels = {"x_label": "epoch", "y_label": "accuracy, %"}
    linear, log = (
        pixels(curves(series, tmp_path / f"{log_x}.png", levels={"original": 0.95}, log_x=log_x, **labels))
        for log_x in (False, True)
    )
    for image in (linear, log):
        assert image.shape[:2] == (round(3.6 * 140), round(6.4 * 140))
        assert all(count(image, colour, tolerance=30).sum() > 100 for colour in ("#d9480f", "#2b8a3e", "#868e96"))
    assert (linear != log).any()
    assert pixels(curves(series, tmp_path / "plain.png", **labels)).size


def test_tradeoff_curves_beside_the_gaussian_ones(tmp_path):
    line = np.linspace(0, 1, 50)
    apart = {"far apart": (line, (1 - line) ** 8)}
    image = pixels(tradeoff_curve(apart, tmp_path / "new" / "curve.png", mu={"far apart": 2.0}))
    assert image.shape[:2] == (round(4.4 * 140), round(4.6 * 140))
    left, right = np.array_split(count(image, HELPS, tolerance=60), 2)
    assert left.sum() > 2 * right.sum() > 0  # steep at first
    without, unknown = (
        count(pixels(tradeoff_curve(apart, tmp_path / "b.png", mu=mu)), HELPS, tolerance=60).sum()
        for mu in (None, {"far apart": np.nan})
    )
    assert left.sum() + right.sum() > 1.1 * without
    assert unknown > 0


@pytest.mark.parametrize("number", [1, 30, 3000])
def test_ranked_mu(number, tmp_path):
    mu = np.random.default_rng(0).normal(size=number) + (number == 1)
    plain = pixels(ranked_mu(mu, mu - 0.5, mu + 0.5, tmp_path / "a.png"))
    blue, orange = (np.flatnonzero(count(plain, colour, tolerance=30)) for colour in (HELPS, HARMS))
    assert len(blue)
    assert count(plain, MARKED, tolerance=30).sum() == 0
    marks = {"highlight": mu == mu.max(), "highlight_label": "poisoned"}
    image = pixels(ranked_mu(mu, mu - 0.5, mu + 0.5, tmp_path / "b.png", **marks))
    marked = np.flatnonzero(count(image, MARKED, tolerance=30))
    assert len(marked)
    if number > 1:
        assert blue.mean() < orange.mean()
        assert marked.min() < 0.25 * image.shape[1]  # the best rank is on the left


@pytest.mark.parametrize("number", [20, 2000])
def test_ranked_mu_without_intervals_and_without_some_values(number, tmp_path):
    mu, nothing = np.random.default_rng(0).normal(size=number), np.full(number, np.nan)
    few = np.where(np.arange(number) % 4, np.nan, mu - 1)
    assert pixels(ranked_mu(mu, nothing, nothing, tmp_path / "a.png")).size
    mu[:5] = np.nan
    assert pixels(ranked_mu(mu, few, few + 2, tmp_path / "b.png")).size
    with pytest.raises(ValueError, match="^mu: no example has one; nothing was observed$"):
        ranked_mu(nothing, nothing, nothing, tmp_path / "c.png")


def test_one_wide_interval_does_not_press_mu_flat(tmp_path):
    mu = np.linspace(1, -1, 20)
    low, high = mu - 0.1, mu + 0.1
    low[3], high[3] = -1e6, 1e6
    rows = count(pixels(ranked_mu(mu, low, high, tmp_path / "a.png")), HELPS, tolerance=30, axis=1)
    assert np.ptp(np.flatnonzero(rows)) > 30


def test_bars_of_groups(tmp_path):
    names, mu = (
        ["helps", "harms", "never seen", "a name that is much too long to be drawn in full"],
        [1, -2, np.nan, 0.5],
    )
    low, high = np.array(mu) - 0.3, np.array(mu) + 0.3
    image = pixels(group_bars(names, mu, low, high, tmp_path / "bars.png", label="on 'a'"))
    blue, orange = (np.flatnonzero(count(image, colour)) for colour in (HELPS, HARMS))
    assert blue.min() > orange.max()  # right and left of zero
    assert np.ptp(orange) / np.ptp(blue) == pytest.approx(2, rel=0.05)
    longest, second = (count(image, colour, axis=1).argmax() for colour in (HELPS, HARMS))
    assert longest < second  # the first group on top
    taller = pixels(group_bars(["x"] * 30, [1] * 30, [0] * 30, [2] * 30, tmp_path / "many.png"))
    assert taller.shape[0] > 2 * image.shape[0]


def test_grid_of_images(tmp_path):
    grey = np.stack([np.full((8, 8), shade, dtype=np.uint8) for shade in (0, 120, 240)])
    image = pixels(image_grid(grey, ["a", "b", "c\nd"], tmp_path / "grid.png"))
    for shade in (0, 120, 240):  # neither stretched nor changed
        assert count(image, f"#{shade:02x}{shade:02x}{shade:02x}").max() > 100
    colours = [Image.new("RGB", (4, 4), colour) for colour in ("#ff0000", "#00ff00")] + [Image.new("P", (4, 6))]
    image = pixels(image_grid(colours, ["a", "b", "c"], tmp_path / "colours.png", columns=2))
    assert count(image, "#ff0000").max() > 100
    assert np.flatnonzero(count(image, "#ff0000")).max() < np.flatnonzero(count(image, "#00ff00")).min()
    half = pixels(image_grid(np.full((2, 4, 4, 1), 0.5), ["x", "x"], tmp_path / "x.png"))
    assert count(half, "#7f7f7f", tolerance=1).max() > 100  # of floats up to 1
    stretched = np.random.default_rng(0).normal(size=(7, 5, 5))
    for pictures in (stretched, np.full((1, 4, 4, 4), 9)):
        assert pixels(image_grid(pictures, ["x"] * len(pictures), tmp_path / "x.png")).size
    for pictures, captions in ((grey, ["a"]), ([], [])):
        with pytest.raises(ValueError, match="^images, captions: "):
            image_grid(pictures, captions, tmp_path / "x.png")
