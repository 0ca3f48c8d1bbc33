"""What the tests of images share: pictures of noise, the tensors that they stand for, and errors of one line."""

import numpy as np
import pytest
import torch
from PIL import Image


GREY, COLOUR = (1, 8, 8), (3, 8, 8)


def noise_image(mode="RGB", size=(8, 8), seed=0):
    bands = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *bands), dtype=np.uint8)
    return Image.fromarray(values, mode)


def as_tensor(image):
    values = torch.from_numpy(np.array(image)).double() / 127.5 - 1
    return values.unsqueeze(0) if values.dim() == 2 else values.permute(2, 0, 1)


def refused(match, function, *args, **options):
    with pytest.raises(ValueError, match=match) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
