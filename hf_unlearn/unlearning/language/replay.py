"""Data-free replay on tokens: sequences made from the forget examples, on which the original says what to keep."""

from __future__ import annotations

import torch
from torch import Tensor


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
