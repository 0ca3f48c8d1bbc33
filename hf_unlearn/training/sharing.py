"""Trainers of a model whose parameters processes share (FSDP2), before they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import broadcast
from torch import nn

from ..parameters.sharding import is_shared


class WholeAtFirstMixin:
    """Until training begins each process has the whole model, and evaluates it so; from then on a part of it."""

    def _place_whole(self) -> None:
        """The stock trainer leaves a model where it is that is to be shared; here it is looked at before."""
        if self.is_fsdp_enabled and not is_shared(self.model):
            self._move_model_to_device(self.model, self.args.device)

    @torch.no_grad()
    def _begin_as_first(self) -> None:
        """With what the first process would train: DDP sees to that, and FSDP2 would take a part from each, as of an adapter that each drew at random."""
        if self.is_fsdp_enabled and not is_shared(self.model):
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(broadcast(parameter.to(self.args.device, copy=True)))

    def evaluation_loop(self, *args, **kwargs):
        """As the stock trainer's. Before processes share the parameters (FSDP2), which is when training begins, each has the whole model, and evaluates it
        as it is: transformers 5.23 would have accelerate share it without an optimiser, which that refuses.
        """
        if not self.is_fsdp_enabled or is_shared(self.model):
            return super().evaluation_loop(*args, **kwargs)
        self._place_whole()
        self.is_fsdp_enabled = False
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.is_fsdp_enabled = True

    def _prepare_for_training(self, *args, **kwargs):
        with _asked_for_embeddings(self.model):
            return super()._prepare_for_training(*args, **kwargs)


@contextmanager
def _asked_for_embeddings(model: nn.Module) -> Iterator[None]:
    """accelerate 1.15 asks a model that is to be shared for its input embeddings, and transformers 5.23 raises where there are none, as in a ResNet."""
    try:
        getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        model.get_input_embeddings = lambda: None
    try:
        yield
    finally:
        model.__dict__.pop("get_input_embeddings", None)
