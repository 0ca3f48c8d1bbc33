import struct

import numpy as np
import pytest
from PIL import Image, ImageColor

from hf_unlearn.plots import COLOURS, curves, per_class_bars


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
