"""Answers as token ids, those that `SFTTrainer` counts, and what a model answers by itself."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from trl import maybe_convert_to_chatml

from ..modes import looking
from .losses import IGNORED


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt.

    Attributes:
        ids (`list[int]`): prompt and answer.
        labels (`list[int]`): the same, −100 where a token is no part of the answer.
        prompt (`list[int]`): what a model is given to answer by itself; empty where there is nothing to answer.
    """

    ids: list[int]
    labels: list[int]
    prompt: list[int]

    @property
    def counted(self) -> list[int]:
        """The answer's tokens; the first token of all is none, since nothing predicts it."""
        return [label for label in self.labels[1:] if label != IGNORED]


def read_answer(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Answer:
    """The tokens of a row that `SFTTrainer` counts: of `prompt` and `completion` the completion, of `text` all.

    Of `messages`, which it counts whole, only the last one, which has to be the assistant's. Rows of `input_ids` (and
    `labels`) are taken as they are. Conversations go through the chat template, with `chat_template_kwargs` if the row has them.

    Args:
        row (`dict`): in a format of `SFTTrainer`.
        tokenizer: with a chat template where rows are conversations.
        max_length (`int`, *optional*): what comes after so many tokens is cut off.

    Raises:
        ValueError: messages that do not end with the assistant, or no token that counts.
    """
    if "input_ids" in row:
        ids, labels = row["input_ids"], row.get("labels") or row["input_ids"]
        start = next((place for place, label in enumerate(labels) if label != IGNORED), 0)
        prompt = ids[:start]
    elif "text" in row:
        ids, start, prompt = tokenizer(_ended(row["text"], tokenizer))["input_ids"], 0, []
        labels = ids
    else:
        prompt, ids = _prompt_and_whole(as_pair(row), tokenizer)
        differ = (place for place, (one, other) in enumerate(zip(prompt, ids, strict=False)) if one != other)
        start = next(differ, min(len(prompt), len(ids)))
        labels = [IGNORED] * start + ids[start:]
    answer = Answer(ids[:max_length], labels[:max_length], prompt)
    if not answer.counted:
        raise ValueError(
            "has no token that counts; fill in what is to be answered"
            + (f", or raise max_length={max_length}" if max_length and len(ids) > max_length else "")
        )
    return answer


def as_pair(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with `prompt` and `completion` where it has `messages`, of which the last is the answer.

    Raises:
        ValueError: that is not what the assistant says.
    """
    row = maybe_convert_to_chatml(dict(row))
    if "messages" not in row:
        return row
    *prompt, last = row.pop("messages")
    if last["role"] != "assistant":
        raise ValueError(f"ends with a message of role {last['role']!r}; only what the assistant says is an answer")
    return row | {"prompt": prompt, "completion": [last]}


def _prompt_and_whole(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        whole = prompt + _ended(completion, tokenizer)
        return tokenizer(prompt)["input_ids"], tokenizer(whole)["input_ids"]
    settings = {"tokenize": True, "return_dict": True} | (row.get("chat_template_kwargs") or {})
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **settings)
    return before["input_ids"], tokenizer.apply_chat_template(prompt + completion, **settings)["input_ids"]


def _ended(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end


def padded(rows: Sequence[Sequence[int]], value: int, device: torch.device, *, left: bool = False) -> Tensor:
    """Rows of different length as one tensor, `[rows, longest]`."""
    length = max(map(len, rows))
    fill = [[value] * (length - len(row)) for row in rows]
    made = [[*gap, *row] if left else [*row, *gap] for gap, row in zip(fill, rows, strict=True)]
    return torch.tensor(made, device=device)


def as_inputs(
    rows: Sequence[Sequence[int]], device: torch.device, *, pad: int = 0, left: bool = False
) -> dict[str, Tensor]:
    """Rows of token ids as `input_ids` and `attention_mask`, `[rows, longest]`."""
    mask = padded([[1] * len(row) for row in rows], 0, device, left=left)
    return {"input_ids": padded(rows, pad, device, left=left), "attention_mask": mask}


def longest_first(rows: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Numbers of the rows in batches of `size`, of rows of like length; what does not fit into memory shows at once."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    return [order[start : start + size] for start in range(0, len(order), size)]


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


def greedy_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """What a model answers when it always takes the likeliest token, as texts without special tokens; arguments as of [`written`]."""
    ids = written(model, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=0, batch_size=batch_size)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)
