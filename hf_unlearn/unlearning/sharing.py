"""Processes that share the parameters of a model among them (FSDP2), beside those that each have all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..parameters.reference import trainable_parameters
from ..parameters.sharding import is_shared


if TYPE_CHECKING:
    from ..parameters.anchors import Anchor
    from ..parameters.reference import ReferencePoint


class SharingMixin:
    """Until training begins each process has the whole model, and does with it what comes before the first step; from then on a part of it, of the
    original and of the anchor.
    """

    reference: ReferencePoint | None
    anchor: Anchor | None
    _shares = True  # a trainer may not know how

    def _place_whole(self) -> None:
        """The stock trainer leaves a model where it is that is to be shared; here it is looked at before."""
        if self.is_fsdp_enabled and not is_shared(self.model):
            self._move_model_to_device(self.model, self.args.device)

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
        """As the stock trainer's, which is where processes begin to share the parameters (FSDP2): what is held of the original is shared alike."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        parameters = trainable_parameters(self.model)
        if is_shared(self.model):
            whole, self.reference = self.reference, self.reference.sharded_like(self.model)
            if self.anchor is not None:
                self.anchor.share_(parameters, whole.parameters, self.reference.parameters)
        return prepared
