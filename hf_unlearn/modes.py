"""What a look at a model must leave as it was: its mode, and the random state; and torch's threads, for a while."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import nn


THREADS = "OMP_NUM_THREADS"


@contextmanager
def one_thread() -> Iterator[None]:
    """torch with one thread: for very small models a second one has to be waited for. Who has set `OMP_NUM_THREADS` keeps it."""
    if THREADS in os.environ:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every part of `model` in eval mode, and afterwards those that were not in training mode again."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


@contextmanager
def looking(model: nn.Module | Callable) -> Iterator[torch.device]:
    """Eval mode, no gradients, and afterwards the random state and the training flags of before; gives the model's device."""
    is_module = isinstance(model, nn.Module)
    device = next(model.parameters()).device if is_module else torch.device("cpu")
    with (
        in_eval_mode(model) if is_module else nullcontext(),
        torch.no_grad(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        yield device


def seeded_generator(device: torch.device | str, *key: int) -> torch.Generator:
    """Randomness as a function of `key` alone, so that a resumed run draws the same."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
