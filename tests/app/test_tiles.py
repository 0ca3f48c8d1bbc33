"""Tiles: which one a click meant, and what is seen around them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_unlearn.app.tiles import BLOCKED, CLEAN, GAP, Layout, tiles


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 700), st.integers(1, 700), st.data())
def test_a_click_on_a_tile_means_that_tile(count, columns, height, width, data):
    layout = Layout.of(torch.empty(count, 1, height, width, device="meta"), columns)
    place = data.draw(st.integers(0, count - 1))
    x, y = layout.corner(place)
    inside = (
        data.draw(st.integers(-GAP, layout.width + GAP - 1)),
        data.draw(st.integers(-GAP, layout.height + GAP - 1)),
    )
    assert layout.place(x + inside[0], y + inside[1]) == place
    right, bottom = layout.size
    assert x - GAP >= 0
    assert x + layout.width + GAP <= right
    assert y + layout.height + GAP <= bottom
    for outside in ((-1, 5), (5, -1), (right, 5), (5, bottom)):
        assert layout.place(*outside) is None


def colours(picture, layout, place, reach):
    """Those within `reach` pixels outside of a tile."""
    x, y = layout.corner(place)
    pixels = np.asarray(picture)
    ring = pixels[y - reach : y, x : x + layout.width]
    return {f"#{r:02x}{g:02x}{b:02x}" for r, g, b, a in ring.reshape(-1, 4).tolist() if a}


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 48), (3, 300, 500)])
def test_rings_and_images(shape):
    images = torch.rand(7, *shape, generator=torch.Generator().manual_seed(0))
    images[6] = torch.nan
    layout = Layout.of(images)
    picture = tiles(
        images, blocked=[False, True] + [False] * 5, marks=[None, None, "clean", "undesired", None, None, None]
    )
    assert picture.size == layout.size
    seen = [colours(picture, layout, place, 6) for place in range(7)]
    assert [BLOCKED in seen[place] for place in range(4)] == [False, True, False, True]
    assert [CLEAN in seen[place] for place in range(4)] == [False, False, True, False]
    thick = [colours(picture, layout, place, GAP) for place in (1, 3)]
    assert all(BLOCKED in ring for ring in thick)
    array = np.asarray(picture)
    x, y = layout.corner(6)
    assert not array[y : y + layout.height, x : x + layout.width, :3].any()
    x, y = layout.corner(4)
    tile = array[y : y + layout.height, x : x + layout.width, :3].mean((0, 1)) / 255
    np.testing.assert_allclose(tile, images[4].expand(3, -1, -1).mean((1, 2)).numpy(), atol=0.02)
    assert np.asarray(picture)[-1, -1, 3] == 0  # nothing where there is no tile
