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


def count(image, colour, tolerance=0):
    return (np.abs(image.astype(int) - ImageColor.getrgb(colour)) <= tolerance).all(-1).sum(0)  # by column


@pytest.fixture
def accuracy():
    return {"original": [0.9, 0.8, 1.0, 0.7], "unlearned": [0.9, 0.8, 0.0, 0.7], "retrained": [0.9, 0.8, 0.0, 0.7]}


def test_bars_of_every_model_and_the_forgotten_class_shaded(accuracy, tmp_path):
    path = per_class_bars(accuracy, ["a", "b", "c", "d"], [2], tmp_path / "new" / "folder" / "bars.png")
    assert path == tmp_path / "new" / "folder" / "bars.png"
    image = pixels(path)
    assert image.shape[:2] == (round(3.4 * 140), round((1.6 + 0.75 * 4) * 140))
    shaded = np.flatnonzero(count(image, SHADE) > 20)
    assert len(shaded)
    middle = (shaded.min() + shaded.max()) / 2 / image.shape[1]
    assert 0.55 < middle < 0.75  # the third of four
    for colour in COLOURS.values():
        assert count(image, colour).sum() > 500


def test_nothing_is_shaded_where_nothing_is_forgotten(accuracy, tmp_path):
    image = pixels(per_class_bars(accuracy, ["a", "b", "c", "d"], [], tmp_path / "bars.png"))
    assert count(image, SHADE).sum() == 0


def test_taller_bars_for_higher_accuracy(tmp_path):
    heights = [
        count(pixels(per_class_bars({"original": [value]}, ["a"], [], tmp_path / "a.png")), COLOURS["original"]).max()
        for value in (0.25, 0.5, 0.75)
    ]  # beside a patch of the legend
    assert heights[2] - heights[1] == pytest.approx(heights[1] - heights[0], abs=2)
    assert heights[1] - heights[0] > 50


def test_classes_without_examples_and_more_models_than_named_colours(tmp_path):
    series = {f"model {i}": [0.5, float("nan")] for i in range(4)}
    assert pixels(per_class_bars(series, ["a", "b"], [1], tmp_path / "a.png")).size


@pytest.mark.parametrize("log_x", [False, True])
def test_curves(log_x, tmp_path):
    series = {"ours": ([1, 10, 100], [0.9, 0.8, 0.7]), "paper": ([1, 10, 100], [0.9, 0.2, 0.1])}
    path = curves(
        series, tmp_path / "curves.png", x_label="epoch", y_label="accuracy, %", levels={"original": 0.95}, log_x=log_x
    )
    image = pixels(path)
    assert image.shape[:2] == (round(3.6 * 140), round(6.4 * 140))
    assert all(count(image, colour, tolerance=30).sum() > 100 for colour in ("#d9480f", "#2b8a3e", "#868e96"))


# Influence


def test_tradeoff_curves_beside_the_gaussian_ones(tmp_path):
    line = np.linspace(0, 1, 50)
    apart = {"far apart": (line, (1 - line) ** 8)}
    image = pixels(tradeoff_curve(apart, tmp_path / "new" / "curve.png", mu={"far apart": 2.0}))
    assert image.shape[:2] == (round(4.4 * 140), round(4.6 * 140))
    left, right = np.array_split(count(image, HELPS, tolerance=60), 2)
    assert left.sum() > 2 * right.sum() > 0  # steep at first
    with_fit = count(image, HELPS, tolerance=60).sum()
    assert with_fit > 1.1 * count(pixels(tradeoff_curve(apart, tmp_path / "b.png")), HELPS, tolerance=60).sum()
    assert count(
        pixels(tradeoff_curve(apart, tmp_path / "c.png", mu={"far apart": np.nan})), HELPS, tolerance=60
    ).sum()


@pytest.mark.parametrize("number", [1, 30, 3000])
def test_ranked_mu(number, tmp_path):
    mu = np.random.default_rng(0).normal(size=number) + (number == 1)
    marked = mu == mu.max()
    plain = pixels(ranked_mu(mu, mu - 0.5, mu + 0.5, tmp_path / "a.png"))
    assert count(plain, HELPS, tolerance=30).sum() > 20
    assert (count(plain, HARMS, tolerance=30).sum() > 20) == (number > 1)
    assert count(plain, MARKED, tolerance=30).sum() == 0
    image = pixels(ranked_mu(mu, mu - 0.5, mu + 0.5, tmp_path / "b.png", highlight=marked, highlight_label="poisoned"))
    columns = np.flatnonzero(count(image, MARKED, tolerance=30))
    assert number == 1 or columns.min() < 0.25 * image.shape[1]  # the best rank is on the left
    if number > 1:
        blue, orange = (np.flatnonzero(count(plain, colour, tolerance=30)).mean() for colour in (HELPS, HARMS))
        assert blue < orange


@pytest.mark.parametrize("number", [20, 2000])
def test_ranked_mu_without_intervals_and_without_some_values(number, tmp_path):
    mu = np.random.default_rng(0).normal(size=number)
    nothing = np.full(number, np.nan)
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
    rows = (
        np.abs(pixels(ranked_mu(mu, low, high, tmp_path / "a.png")).astype(int) - ImageColor.getrgb(HELPS)) < 30
    ).all(-1)
    assert np.ptp(np.flatnonzero(rows.any(1))) > 30


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
    for pictures in (
        np.random.default_rng(0).normal(size=(7, 5, 5)),
        np.full((2, 4, 4, 1), 0.5),
        np.full((1, 4, 4, 4), 9),
    ):
        assert pixels(image_grid(pictures, ["x"] * len(pictures), tmp_path / "x.png")).size
    for pictures, captions in ((grey, ["a"]), ([], [])):
        with pytest.raises(ValueError, match="^images, captions: "):
            image_grid(pictures, captions, tmp_path / "x.png")
