"""Questions and answers that are plain texts, of a model that was taught them as turns of a conversation."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from ...modes import looking
from ...training.answers import Answer, read_answer
from ...training.collators import ALTERNATE
from ...training.logits import logits_at, places_of
from ...training.losses import IGNORED
from ...training.texts import as_chat
from .subject import special_tokens


LOOKED = 8  # rows at most
LONGEST = 512  # tokens; longer rows are passed over
TIMES = 2.0  # as likely, in the geometric mean over answers, as which they are evidently taught so


def are_texts(rows: Any) -> bool:
    """Whether rows are prompts and completions that are texts, which TRL reads without a chat template."""
    if not isinstance(rows, Dataset) or not len(rows) or not {"prompt", "completion"} <= set(rows.column_names):
        return False
    return all(isinstance(rows[0][name], str) for name in ("prompt", "completion"))


def as_turns(rows: Dataset, argument: str) -> Dataset:
    """Such rows as conversations, without the spaces around their texts."""
    rows = as_chat(rows, argument)
    if ALTERNATE not in rows.column_names:
        return rows
    return rows.map(
        lambda row: {ALTERNATE: row[ALTERNATE].strip() if isinstance(row[ALTERNATE], str) else row[ALTERNATE]}
    )


def taught_in_turns(model: nn.Module, tokenizer: Any, rows: Dataset) -> tuple[bool, float, float]:
    """Whether the model was evidently taught such answers through its chat template: they are [`TIMES`] as likely there, and it does not merely
    guess (a token has more than the square root of the probability that all tokens have alike).

    Args:
        model (`PreTrainedModel`): left in the mode it was in.
        tokenizer: with a chat template.
        rows (`Dataset`): prompts and completions that are texts; the first few are looked at.

    Returns:
        `tuple[bool, float, float]`: the answer, and the mean log-likelihood of a completion through the template and without it, nats.
    """
    some = rows.select(range(min(LOOKED, len(rows)))).select_columns(["prompt", "completion"])
    pairs = zip(
        *([read_answer(row, tokenizer) for row in part] for part in (as_chat(some, "rows"), some)), strict=True
    )
    pairs = [pair for pair in pairs if max(len(answer.ids) for answer in pair) <= LONGEST]
    if not pairs:
        return False, math.nan, math.nan
    ends = special_tokens(tokenizer)
    turns, plain = ([_log_p(model, answer, ends) for answer in part] for part in zip(*pairs, strict=True))
    means = [sum(map(sum, part)) / len(pairs) for part in (turns, plain)]
    guessing = -math.log(len(tokenizer)) / 2
    guesses = sum(map(sum, turns)) < guessing * sum(map(len, turns))
    return means[0] > means[1] + math.log(TIMES) and not guesses, *means


def _log_p(model: nn.Module, answer: Answer, ends: Collection[int]) -> list[float]:
    """Log-probabilities of an answer's tokens, up to the first that stands for no text."""
    begin = next(place for place, label in enumerate(answer.labels) if label != IGNORED and place > 0)
    end = next((place for place in range(begin, len(answer.ids)) if answer.ids[place] in ends), len(answer.ids))
    with looking(model) as device:
        ids = torch.tensor([answer.ids], device=device)
        places = places_of([range(begin - 1, end - 1)], len(answer.ids), device)
        log_p = logits_at(model, {"input_ids": ids}, places).float().log_softmax(-1)
        return log_p.gather(-1, ids[0, begin:end, None]).flatten().tolist()
