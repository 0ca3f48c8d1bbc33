"""A language model that is audited: what it gives to answers, and what it writes. Every look is taken once."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ...training.answers import as_inputs, greedy_answers, padded
from ...training.evaluation import LanguageScores
from ...training.logits import answered, logits_at
from ...training.losses import IGNORED, cross_entropy, mean_of_counted
from ..audited import AuditedModel
from .data import BATCH, LanguageData, Part


class LanguageSubject(AuditedModel):
    """A causal language model, with or without an adapter."""

    def copy(self) -> nn.Module:
        """A model of its own to attack, in eval mode, adapters merged, of which every weight may be trained."""
        attacked = copy.deepcopy(self.model).eval()
        if hasattr(attacked, "merge_and_unload"):
            attacked = attacked.merge_and_unload()
        for parameter in attacked.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return attacked

    def look(self, part: Part) -> LanguageScores:
        """What it gives to the answers of a part, and what it writes in their place if that is wanted.

        Raises:
            ValueError: losses that are not finite.
        """
        return self.once(part, lambda: self._scores(part))

    def _scores(self, part: Part) -> LanguageScores:
        scores = part.evaluation(self.model)
        if not np.isfinite(scores.nll).all():
            raise ValueError("what the model gave is not finite")
        return scores


def said(model: nn.Module, part: Part, prompts: Sequence[Sequence[int]]) -> list[str]:
    """What a model answers to prompts in place of a part's own, greedily.

    Raises:
        ValueError: prompts that leave no room for an answer.
    """
    check_room(model, prompts)
    limit = part.max_new_tokens
    return greedy_answers(model, part.tokenizer, prompts, max_new_tokens=limit, batch_size=BATCH)


def check_room(model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts that are empty, or that leave a model no place for an answer.

    Raises:
        ValueError: naming the length.
    """
    room, longest = room_of(model), max(map(len, prompts))
    if longest >= room:
        raise ValueError(f"a prompt of {longest} tokens leaves no room for an answer in the model's {room}")
    if not all(prompts):
        raise ValueError("a row has no prompt, so there is nothing to answer")


def room_of(model: nn.Module) -> float:
    """Tokens that a model has positions for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def losses(model: nn.Module, part: Part) -> torch.Tensor:
    """Mean negative log-likelihood of each answer's tokens, with gradients: `[rows]`, nats."""
    device = next(model.parameters()).device
    labels = padded([answer.labels for answer in part.answers], IGNORED, device)
    places = answered(labels)
    logits = logits_at(model, as_inputs([answer.ids for answer in part.answers], device), places)
    targets = labels[:, 1:]
    return mean_of_counted(cross_entropy(logits, targets[places[:, :-1]]), targets)


def pace(subject: LanguageSubject, data: LanguageData) -> tuple[float, float]:
    """Seconds that an example takes forward, and in a step of training, measured on a batch each; what a written answer takes is noted in the
    data.
    """
    part = data.forget.select(range(min(BATCH, len(data.forget))))
    few, model = part.select(range(min(8, len(part)))), subject.copy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def seconds(run: Callable[[Part], Any], rows: Part) -> float:
        times = []
        for _ in range(2):  # the first one takes longer
            started = time.perf_counter()
            run(rows)
            times.append(time.perf_counter() - started)
        return min(times) / len(rows)

    def train(rows: Part) -> None:
        losses(model, rows).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    forward = seconds(torch.no_grad()(lambda rows: losses(model, rows)), part)
    data.written = seconds(lambda rows: said(model, rows, rows.prompts), part) / forward
    return forward, seconds(train, few)
