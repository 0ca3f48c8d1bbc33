"""The base of forget losses that give each token of an answer a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...training.losses import IGNORED, mean_over_predictions
from ..forget_loss import ForgetLoss


class TokenLoss(ForgetLoss):
    """A mean over the tokens of each text that count."""

    of_texts = True

    def means(self, model: Callable, batch: Any) -> Tensor:
        logits, targets = self.trainer.predictions(model, batch)
        return mean_over_predictions(self.of_tokens(logits, targets, batch), targets)

    def of_tokens(self, logits: Tensor, targets: Tensor, batch: Any) -> Tensor:
        """`[rows, tokens, vocabulary]` and `[rows, tokens]`, −100 where none, -> `[rows, tokens]`."""
        raise NotImplementedError


def nll_of(logits: Tensor, targets: Tensor) -> Tensor:
    """−log p of every token, fp32, 0 where none counts: `[rows, tokens, vocabulary]`, `[rows, tokens]` -> `[rows, tokens]`."""
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
