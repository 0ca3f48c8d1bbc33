"""The base of forget losses that give each token of an answer a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...training.losses import IGNORED, mean_of_counted
from ..forget_loss import ForgetLoss


class TokenLoss(ForgetLoss):
    """A mean over the tokens of each text that count."""

    of_texts = True

    def means(self, model: Callable, batch: Any) -> Tensor:
        logits, targets = self.trainer.counted(model, batch)
        return mean_of_counted(self.of_tokens(logits, targets[targets != IGNORED], batch), targets)

    def of_tokens(self, logits: Tensor, targets: Tensor, batch: Any) -> Tensor:
        """Of the tokens that count, text after text, `[tokens, vocabulary]` and `[tokens]` -> `[tokens]`."""
        raise NotImplementedError
