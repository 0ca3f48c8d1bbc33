"""Tiles: what they show, and how."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from hf_unlearn.app.tiles import LARGEST, tiles


def shown(html):
    return [Image.open(io.BytesIO(base64.b64decode(part))) for part in re.findall(r'base64,([^"]+)"', html)]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 48), (3, 300, 500)])
def test_images(shape):
    images = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    images[4] = torch.nan
    pictures = shown(tiles(images, numbers=range(5)))
    assert len(pictures) == 5
    assert not np.asarray(pictures[4].convert("RGB")).max() > 2
    if max(shape) <= 64:  # to the pixel
        expected = (images[2] * 255).round().permute(1, 2, 0).squeeze(-1).numpy()
        assert np.array_equal(np.asarray(pictures[2]), expected.astype(np.uint8))
    else:
        assert max(pictures[2].size) == LARGEST
        assert pictures[2].width / pictures[2].height == pytest.approx(500 / 300, abs=0.01)
        np.testing.assert_allclose(np.asarray(pictures[2]).mean() / 255, images[2].mean().item(), atol=0.02)


def test_words():
    html = tiles(
        torch.zeros(4, 1, 4, 4),
        numbers=[7, 8, 9, 10],
        blocked=[False, True, False, True],
        marks=[None, None, "clean", "undesired"],
        titles=["a", '"><script>x</script>', "b", "c"],
    )
    found = re.findall(r'<button type="button" class="([^"]+)" data-number="(\d+)" aria-label="([^"]+)"', html)
    assert found == [
        ("tile", "7", "sample 7"),
        ("tile blocked", "8", "sample 8, blocked"),
        ("tile clean", "9", "sample 9, clean"),
        ("tile undesired blocked", "10", "sample 10, undesired, blocked"),
    ]
    assert "<script>" not in html
    assert "<button" not in tiles(torch.zeros(1, 1, 4, 4), numbers=[0])
