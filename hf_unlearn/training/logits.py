"""Logits of a language model where they are read: of long texts and a large vocabulary they take more memory than anything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .losses import IGNORED


AT_ONCE = 2**28  # of looks: one text of 2,048 tokens from a vocabulary of 131,072; 1 GB in fp32


def logits_at(
    forward: Callable, inputs: Mapping[str, Tensor], places: Tensor, *, model: Callable | None = None
) -> Tensor:
    """Logits `[places, vocabulary]` at some of the tokens, row after row; no others are computed where `model` has a head of its own.

    Args:
        forward (callable): takes `inputs` and `use_cache=False`, and answers with `logits`.
        inputs: of a batch, `[rows, length]`; with prompt tuning the logits begin with those of the virtual tokens, which are not counted.
        places (`Tensor`): bool, `[rows, length]`.
        model (*optional*): whose head it is, where `forward` is a wrapper of it. One that is compiled, or has no head, computes all.
    """
    with only_at(forward if model is None else model, places) as picked:
        logits = forward(**inputs, use_cache=False).logits
    return logits[0] if picked else logits[:, -places.shape[1] :][places]


@contextmanager
def only_at(model: Callable, places: Tensor) -> Iterator[list[bool]]:
    """While it lasts, the head of a model sees hidden states at some places only, `[1, places, width]`; gives a list that is empty as long as it
    has not. Arguments as of [`logits_at`].
    """
    picked: list[bool] = []

    def pick(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].dim() != 3 or len(args[0]) != len(places):
            return None
        picked.append(True)
        return args[0][:, -places.shape[1] :][places.to(args[0].device)].unsqueeze(0), *args[1:]

    head = _head(model)
    hook = None if head is None else head.register_forward_pre_hook(pick)
    try:
        yield picked
    finally:
        if hook is not None:
            hook.remove()


def _head(model: Callable) -> nn.Module | None:
    """What makes logits of hidden states; None where a hook would not be seen, or would be seen for ever."""
    if not isinstance(model, nn.Module) or not hasattr(model, "get_output_embeddings"):
        return None
    compiled = any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in model.modules())
    return None if compiled else model.get_output_embeddings()


def answered(labels: Tensor) -> Tensor:
    """Places whose logits are of a token that counts, bool, as the labels `[rows, length]`."""
    return F.pad(labels[:, 1:] != IGNORED, (0, 1))


def places_of(rows: Sequence[Sequence[int]], length: int, device: torch.device) -> Tensor:
    """Numbers of each row's places as `[rows, length]`, bool."""
    places = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, some in enumerate(rows):
        places[number, list(some)] = True
    return places.to(device)


def in_batches(order: Sequence[int], counts: Sequence[int], size: int, model: Any) -> list[list[int]]:
    """Rows in batches of at most `size`, which have no more logits than [`AT_ONCE`] together; a row that has more by itself is alone.

    Args:
        order: numbers of the rows.
        counts: of how many places of each row logits are read.
        size (`int`): rows at most.
        model: its config tells the vocabulary; without one there is no other limit.
    """
    config = getattr(model, "config", None)
    most = AT_ONCE // config.get_text_config().vocab_size if hasattr(config, "get_text_config") else math.inf
    batches: list[list[int]] = []
    room = 0
    for row in order:
        if not batches or len(batches[-1]) == size or counts[row] > room:
            batches.append([])
            room = most
        batches[-1].append(row)
        room -= counts[row]
    return batches
