"""What all families do alike: one model of an audit, whose looks are taken once, and a copy of it that is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..modes import seeded_generator
from .check import Role
from .digests import digest_of


class AuditedModel:
    """One model of an audit, as [`Subject`][hf_unlearn.audit.check.Subject] says.

    Args:
        model (`nn.Module` | `DiffusionPipeline`): on any device. It is looked at and copied, never changed.
        role (`str`), name (`str`): see there.
    """

    def __init__(self, model: Any, role: Role, name: str):
        self.model, self.role, self.name = model, role, name
        self._looks: dict[int, tuple[Any, Any]] = {}

    @cached_property
    def digest(self) -> str:
        return digest_of(self.model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def once(self, what: Any, look: Callable[[], Any]) -> Any:
        """What `look` gave for `what`, which is kept beside, so that its id stays its own."""
        if id(what) not in self._looks:
            self._looks[id(what)] = what, look()
        return self._looks[id(what)][1]


def reshuffled(count: int, size: int, steps: int, seed: int, key: int) -> Tensor:
    """Rows of each step, `[steps, size]`: drawn without replacement, and again as often as there is need. `key`: of this use of the seed."""
    generator = seeded_generator("cpu", seed, key)
    rounds = -(-steps * size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
    return order[: steps * size].view(steps, size)


def trained_on(model: nn.Module, loss: Callable[[int], Tensor], marks: Sequence[int], rate: float) -> Iterator[int]:
    """Train a model in place, in training mode as a user's would be, by AdamW with clipped gradients; stops after each of the marks' steps.

    Args:
        loss (callable): of a step, counted from 0, to a scalar.
        marks (`Sequence[int]`): steps after which is stopped, rising.
        rate (`float`): of AdamW.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    model.train()
    for step in range(marks[-1]):
        loss(step).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in marks:
            yield step + 1
