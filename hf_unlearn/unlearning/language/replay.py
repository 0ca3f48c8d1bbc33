"""Data-free replay on tokens: sequences made from the forget examples, on which the original says what to keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def ordinary_tokens(model: PreTrainedModel, tokenizer: Any) -> Tensor:
    """Token ids that are no special tokens, `[size]`.

    Args:
        model (`PreTrainedModel`): its config and its embeddings say which ids there are.
        tokenizer (*optional*): what is special besides; chat control tokens have no name in a config.
    """
    config, size = model.config, model.get_input_embeddings().weight.shape[0]
    special = set(getattr(tokenizer, "all_special_ids", ()))
    special |= {index for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        size = min(size, len(tokenizer))  # embeddings are often padded to a round number
    for kind in ("pad", "bos", "eos", "unk", "cls", "sep"):
        token = getattr(config, f"{kind}_token_id", None)
        special.update(token if isinstance(token, list) else [token])  # Llama 3 has several eos tokens
    return torch.tensor([i for i in range(size) if i not in special])


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
