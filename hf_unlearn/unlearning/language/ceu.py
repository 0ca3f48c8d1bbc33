"""CE-U: cross-entropy to the student's own distribution without the answer (arXiv 2503.01224)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..losses import redirect
from .tokens import TokenLoss


def ceu(logits: Tensor, targets: Tensor) -> Tensor:
    r"""[`~hf_unlearn.unlearning.losses.redirect`] to the student's own distribution in the original's place, which takes no gradient.

    Args:
        logits (`Tensor`): `[…, vocabulary]`.
        targets (`Tensor`): `[…]`; −100 takes nothing away.

    Returns:
        `Tensor`: `[…]`.
    """
    own = torch.zeros_like(logits, dtype=torch.bool)
    own.scatter_(-1, targets.clamp(min=0).unsqueeze(-1), (targets >= 0).unsqueeze(-1))
    return redirect(logits, logits.detach(), own)


class Ceu(TokenLoss):
    """CE-U's loss."""

    name, credit = "ceu", {"CE-U's loss": "2503.01224"}

    def of_tokens(self, logits: Tensor, targets: Tensor, batch: Any) -> Tensor:
        return ceu(logits, targets)
