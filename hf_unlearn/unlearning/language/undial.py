"""UNDIAL: distils an original whose own answer is less likely (arXiv 2402.10052)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .tokens import TokenLoss


def undial(logits: Tensor, reference_logits: Tensor, targets: Tensor, beta: float = 10.0) -> Tensor:
    r"""Cross-entropy to the original with the answer's own logit lowered: $-\sum_c q_c \log p_c$, $q = \mathrm{softmax}(z^* - \beta\,1_y)$.
    [`~hf_unlearn.unlearning.losses.redirect`] is the case β → ∞.

    Args:
        logits, reference_logits (`Tensor`): `[…, vocabulary]`.
        targets (`Tensor`): the answer, `[…]`; −100 lowers nothing.
        beta (`float`): how far the logit is lowered.

    Returns:
        `Tensor`: `[…]`.
    """
    lowering = torch.where(targets >= 0, -beta, 0.0).unsqueeze(-1)
    target = reference_logits.float().scatter_add(-1, targets.clamp(min=0).unsqueeze(-1), lowering).softmax(-1)
    return -(target * logits.float().log_softmax(-1)).sum(-1)


class Undial(TokenLoss):
    """UNDIAL's loss."""

    name, credit = "undial", {"UNDIAL's loss": "2402.10052"}

    def of_tokens(self, logits: Tensor, targets: Tensor, batch: Any) -> Tensor:
        reference_logits, _ = self.trainer.counted(self.trainer.reference_forward, batch)
        return undial(logits, reference_logits, targets)
