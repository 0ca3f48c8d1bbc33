"""What the original writes by itself: texts that stand for what is to be kept where there are no data.

A chat model that is given the beginning of a user's turn writes a question, and then answers it (Magpie, arXiv 2406.08464); any language
model writes texts after the token that begins one. Drawn at temperature 1 they are samples of what the model knows, in proportion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...training.answers import written
from .subject import special_tokens


HERE = "\ue000"  # a character of nobody's, where the user's words go


def own_texts(
    model: nn.Module,
    tokenizer: Any,
    number: int,
    *,
    chat: bool,
    prompts: Sequence[str] = (),
    max_new_tokens: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> list[tuple[list[int], int, int]]:
    """Texts that the model writes.

    Args:
        model, tokenizer: the original.
        number (`int`): how many; questions that come out empty are left out. Of 0 nothing is asked, of the tokenizer neither.
        chat (`bool`): a question and its answer each, through the chat template.
        prompts (*optional*): questions that somebody has, in place of the model's own.
        max_new_tokens (`int`, defaults to 256): of a question, and of an answer.
        seed (`int`, defaults to 0): of the draws.
        progress (`bool`, defaults to `False`): show a bar.

    Returns:
        `list[tuple[list[int], int, int]]`: token ids, where the model's own words begin, and where its answer does: after the question, or after
            the token that begins the text.

    Raises:
        ValueError: no template for chat, or no token to begin with.
    """
    if not number and not prompts:
        return []
    draw = {"max_new_tokens": max_new_tokens, "progress": progress}
    if not chat and not prompts:
        start = first_token(tokenizer)
        return [
            ([start, *text], 1, 1) for text in written(model, tokenizer, [[start]] * number, seed=seed, **draw) if text
        ]
    if chat and tokenizer.chat_template is None:
        raise ValueError(
            "processing_class: has no chat template; set tokenizer.chat_template, or pass retain_dataset="
        )
    begin = 0
    if not prompts:
        turn = tokenizer.apply_chat_template(
            [{"role": "user", "content": HERE}], add_generation_prompt=True, tokenize=False
        )
        before, _, after = turn.partition(HERE)
        # A space at the end would be a part of the first word's token.
        start = tokenizer(before.rstrip(" "), add_special_tokens=False)["input_ids"]
        asked = written(model, tokenizer, [start] * number, seed=seed, stop=special_tokens(tokenizer), **draw)
        texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in asked)
        if end := after.strip():  # of no special tokens in some templates: the model goes on with an answer
            texts = (text.partition(end)[0] for text in texts)
        prompts = [question for text in texts if (question := text.strip())]
        begin = len(start)
    if chat:
        rows = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            for prompt in prompts
        ]
    else:
        rows = tokenizer(list(prompts))["input_ids"]
    answers = written(model, tokenizer, rows, seed=seed + 1, **draw)
    return [
        ([*row, *answer], begin or len(row), len(row)) for row, answer in zip(rows, answers, strict=True) if answer
    ]


def can_begin(tokenizer: Any) -> bool:
    """Whether there is a token that a text begins with."""
    return tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None


def first_token(tokenizer: Any) -> int:
    """Id of the token that a text begins with.

    Raises:
        ValueError: there is none.
    """
    if not can_begin(tokenizer):
        raise ValueError(
            "processing_class: has no token that a text of the model's own could begin with; pass retain_dataset="
        )
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
