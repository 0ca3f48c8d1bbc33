"""What a language model writes by itself: the texts that stand for what is to be kept, and answers to questions about others."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...modes import looking
from ...training.answers import as_inputs


def written(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    batch_size: int = 128,
    stop: Collection[int] = (),
    seed: int = 0,
    progress: bool = False,
) -> list[list[int]]:
    """What the model writes after each prompt, the end of the turn included, if it comes to one.

    Args:
        model (`PreTrainedModel`): left in the mode it was in.
        tokenizer: its ids of padding and of the end.
        prompts: token ids, at least one each.
        max_new_tokens (`int`, defaults to 256): of each answer at most, and no more than the model has positions for.
        temperature (`float`, defaults to 1.0): 1 draws from the model's own distribution; 0 takes the likeliest token.
        batch_size (`int`, defaults to 128): prompts at once.
        stop (*optional*): tokens that end an answer besides the model's own.
        seed (`int`, defaults to 0): of the draws; the global random state is left as it was.
        progress (`bool`, defaults to `False`): show a bar.

    Returns:
        `list[list[int]]`: the tokens after each prompt; none where the prompt is as long as the model can read.
    """
    ends = (
        model.generation_config.eos_token_id
        if model.generation_config.eos_token_id is not None
        else tokenizer.eos_token_id
    )
    ends = {*stop, *({ends} if isinstance(ends, int) else ends or ())}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    # None of what a model's generation config may ask for: penalties and cuts that make it say what it would not.
    settings = {"do_sample": temperature > 0, "temperature": temperature or None, "num_beams": 1}
    settings |= dict.fromkeys(("top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size"))
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    with looking(model) as device:
        torch.manual_seed(seed)
        for begin in tqdm(range(0, len(order), batch_size), desc="Writing", disable=not progress):
            rows = order[begin : begin + batch_size]
            longest = max(len(prompts[row]) for row in rows)
            if longest >= room:
                continue
            answers = model.generate(
                **as_inputs([prompts[row] for row in rows], device, pad=pad, left=True), pad_token_id=pad,
                max_new_tokens=min(max_new_tokens, room - longest), eos_token_id=list(ends) or None, **settings,
            )  # fmt: skip
            for row, answer in zip(rows, answers[:, longest:].tolist(), strict=True):
                end = next((place + 1 for place, token in enumerate(answer) if token in ends), len(answer))
                found[row] = answer[:end]
    return found
