"""Processes that share the parameters of a model among them (FSDP2), beside those that each have all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..parameters.reference import trainable_parameters
from ..parameters.sharding import is_shared
from ..training.sharing import WholeAtFirstMixin


if TYPE_CHECKING:
    from ..parameters.anchors import Anchor
    from ..parameters.reference import ReferencePoint


class SharingMixin(WholeAtFirstMixin):
    """What comes before the first step is done by each process with the whole model; from then on it has a part of it, of the original and of the
    anchor.
    """

    reference: ReferencePoint | None
    anchor: Anchor | None

    def _prepare_for_training(self, *args, **kwargs):
        """As the stock trainer's, which is where processes begin to share the parameters (FSDP2): what is held of the original is shared alike."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        if is_shared(self.model):
            parameters = trainable_parameters(self.model)
            whole, self.reference = self.reference, self.reference.sharded_like(self.model)
            if self.anchor is not None:
                self.anchor.share_(parameters, whole.parameters, self.reference.parameters)
        return prepared
