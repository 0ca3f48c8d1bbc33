"""How a model is trained and how it unlearns, where whoever asks for an audit hands that over as functions."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Subset

from ..training.checks import shown


TRAININGS = 5  # over which a variance is split
UNLEARNINGS = 2  # of each


@dataclass(frozen=True)
class Functions:
    """The two functions with the rows that they are given, each run under a seed of its own.

    Args:
        unlearn_fn (callable, *optional*): `(model, forget, retain) -> model`. It is given a copy, which it may change and return; the rows to forget
            and those to keep, as they were given to the audit; and random states set for this run.
        train_fn (callable, *optional*): `(rows, seed) -> model`: trained from scratch on such rows, like the original.
        forget, retain (`Dataset`): the rows of the audit.
        seed (`int`): of the audit.
    """

    unlearn_fn: Callable[[nn.Module, Any, Any], nn.Module] | None
    train_fn: Callable[[Any, int], nn.Module] | None
    forget: Any
    retain: Any
    seed: int

    def trained(self, forget_rows: Sequence[int], *number: int) -> nn.Module:
        """A model trained on the rows to keep and on some of the others, by their numbers. `number`: of this training, which seeds it.

        Raises:
            ValueError: the function gave no model.
        """
        rows = joined(self.retain, some(self.forget, forget_rows)) if len(forget_rows) else self.retain
        seed = _seed(self.seed, 61, *number)
        with seeded(seed):
            return _model(self.train_fn(rows, seed), "train_fn")

    def unlearned(self, model: nn.Module, forget_rows: Sequence[int], *number: int) -> nn.Module:
        """What unlearning makes of a copy of a model that was trained on such rows of the forget set. `number`: of this run, which seeds it.

        Raises:
            ValueError: the function gave no model.
        """
        every = len(forget_rows) == len(self.forget)
        rows = self.forget if every else some(self.forget, forget_rows)
        with seeded(_seed(self.seed, 62, *number)):
            return _model(self.unlearn_fn(copy.deepcopy(model), rows, self.retain), "unlearn_fn")


def check_functions(unlearn_fn: Any, train_fn: Any, shadows: Any, training_seeds: Any) -> None:
    """Refuse what cannot be called, and what has no use.

    Raises:
        ValueError: naming the argument.
    """
    for name, given in (("unlearn_fn", unlearn_fn), ("train_fn", train_fn)):
        if given is not None and (not callable(given) or isinstance(given, nn.Module)):
            takes = "(model, forget, retain) -> model" if name == "unlearn_fn" else "(rows, seed) -> model"
            raise ValueError(f"{name}: {type(given).__name__} is no function; pass one that is {takes}")
    if shadows is not None and unlearn_fn is None:
        raise ValueError("shadows: are to be unlearned; pass unlearn_fn= too")
    if (
        isinstance(training_seeds, bool)
        or not isinstance(training_seeds, int)
        or training_seeds in (1,)
        or training_seeds < 0
    ):
        raise ValueError(f"training_seeds={shown(training_seeds)}: must be 0 (no repetition), or at least 2")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random states of Python, NumPy and torch set, and afterwards as they were."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def some(rows: Any, numbers: Sequence[int]) -> Any:
    """These rows of a dataset."""
    numbers = [int(number) for number in numbers]
    return rows.select(numbers) if hasattr(rows, "select") else Subset(rows, numbers)


def joined(one: Any, two: Any) -> Any:
    """The rows of two datasets, one after the other."""
    from datasets import Dataset, concatenate_datasets

    both = isinstance(one, Dataset) and isinstance(two, Dataset)
    return concatenate_datasets([one, two]) if both else ConcatDataset([one, two])


def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0] % 2**31)


def _model(given: Any, argument: str) -> nn.Module:
    if not isinstance(given, nn.Module):
        raise ValueError(f"{argument}: returned {type(given).__name__}; return the model")
    return given
