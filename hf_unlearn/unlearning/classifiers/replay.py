"""Data-free replay: inputs made from the forget examples themselves, on which the original model says what to keep.

The forget set is all that an unlearning run may see, so what must be *kept* has to come from somewhere else: the frozen
original is asked what it says on inputs that are related to the data but show the forgotten class no longer, and the
student is held to the answer.
"""

from __future__ import annotations

import torch
from torch import Tensor


def perturb_images(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images like the given ones in pixels and statistics, unlike them in content.

    A fifth of the batch each, drawn at random: rolled by a random offset, flipped, with Gaussian noise of the batch's
    own standard deviation, with pixels in random order, and uniform noise over the batch's range.

    Args:
        images (`Tensor`): `[batch, channels, height, width]`, any scale; left unchanged.
        generator (`torch.Generator`): on the device of `images`.

    Returns:
        `Tensor`: same shape, dtype and device.
    """
    n, channels, height, width = images.shape
    device = images.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    order = uniform(n).argsort()
    sizes = torch.full((5,), n // 5, device=device)
    sizes[uniform(5).argsort()[: n % 5]] += 1  # small batches: every kind has its turn
    sizes = sizes.tolist()
    rolled, flipped, noised, shuffled, noise = (images[index] for index in order.split(sizes))

    rows = (torch.arange(height, device=device) + (uniform(len(rolled), 1) * height).long()) % height
    columns = (torch.arange(width, device=device) + (uniform(len(rolled), 1) * width).long()) % width
    rolled = rolled.gather(2, rows[:, None, :, None].expand_as(rolled))
    rolled = rolled.gather(3, columns[:, None, None, :].expand_as(rolled))

    kind = (uniform(len(flipped)) * 3).long().view(-1, 1, 1, 1)  # left-right, up-down, both
    flipped = torch.where(kind != 1, flipped.flip(-1), flipped)
    flipped = torch.where(kind != 0, flipped.flip(-2), flipped)

    gaussian = torch.randn(noised.shape, generator=generator, device=device)
    noised = noised + gaussian.to(images.dtype) * images.float().std(correction=0).to(images.dtype)

    pixels = uniform(len(shuffled), 1, height * width).argsort(-1).expand(-1, channels, -1)
    shuffled = shuffled.flatten(2).gather(2, pixels).view_as(shuffled)

    low, high = images.amin(), images.amax()
    noise = low + (high - low) * uniform(*noise.shape).to(images.dtype)

    return torch.cat([rolled, flipped, noised, shuffled, noise])
