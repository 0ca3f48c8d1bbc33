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


def perturb_tokens(
    input_ids: Tensor, attention_mask: Tensor | None, vocabulary: Tensor, generator: torch.Generator
) -> Tensor:
    """Token sequences like the given ones in length and vocabulary, unlike them in meaning.

    A third of the batch each, drawn at random: tokens in random order, every token replaced with probability ½, and
    all tokens drawn anew. The first token of a row, tokens outside `vocabulary` (special ones) and padding stay in place.

    Args:
        input_ids (`Tensor`): `[batch, length]`; left unchanged.
        attention_mask (`Tensor`, *optional*): `[batch, length]`, 0 on padding.
        vocabulary (`Tensor`): `[size]`, the token ids that may be drawn.
        generator (`torch.Generator`): on the device of `input_ids`.

    Returns:
        `Tensor`: same shape, dtype and device.
    """
    n, length = input_ids.shape
    device = input_ids.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    free = torch.isin(input_ids, vocabulary)
    real = torch.ones_like(free) if attention_mask is None else attention_mask.bool()
    free &= real & (real.cumsum(1) > 1)  # not the first token, wherever padding lets the row begin
    # The free places of a row, in reading order and in random order, with the fixed ones behind them in both.
    behind = (~free).to(torch.float32) * 2
    in_order = (behind + torch.arange(length, device=device) / length).argsort(-1)
    at_random = (behind + uniform(n, length)).argsort(-1)
    permuted = torch.empty_like(input_ids).scatter_(1, in_order, input_ids.gather(1, at_random))
    drawn = vocabulary[(uniform(n, length) * len(vocabulary)).long()].to(input_ids.dtype)

    turn = (uniform(1) * 3).long()  # small batches: every kind has its turn
    kind = ((uniform(n).argsort() + turn) % 3).unsqueeze(1)  # 0 permuted, 1 half replaced, 2 all drawn
    replace = (kind == 2) | ((kind == 1) & (uniform(n, length) < 0.5))
    result = torch.where(replace, drawn, torch.where(kind == 0, permuted, input_ids))
    return torch.where(free, result, input_ids)


def divergence(logits: Tensor, reference_logits: Tensor, excluded: Tensor | None = None) -> Tensor:
    r"""KL(p* ‖ p) from the original's distribution to the student's, over the classes that are to be kept.

    Args:
        logits, reference_logits (`Tensor`): `[…, classes]`; computed in fp32.
        excluded (`Tensor`, *optional*): `[classes]` bool, forgotten classes: both distributions are renormalised
            without them, so that replay says nothing about what is to be forgotten.

    Returns:
        `Tensor`: `[…]`, nats, ≥ 0 up to rounding.
    """
    logits, reference_logits = logits.float(), reference_logits.float()
    if excluded is not None:
        logits, reference_logits = logits[..., ~excluded], reference_logits[..., ~excluded]
    log_p, log_q = reference_logits.log_softmax(-1), logits.log_softmax(-1)
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(-1)
