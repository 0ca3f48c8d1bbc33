"""WGA and SatImp: ascent, in which each token weighs by how likely it still is (arXiv 2502.19301, 2505.11953)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...training.losses import cross_entropy
from .tokens import TokenLoss


def wga(nll: Tensor, beta: float = 1.0) -> Tensor:
    r"""WGA: $-p^\beta \ell$, the weight without gradient.

    Args:
        nll (`Tensor`): ℓ = −log p of a token, `[…]`.
        beta (`float`): β ≥ 0; 0 is ascent.

    Returns:
        `Tensor`: `[…]`.
    """
    return -nll.detach().neg().exp().pow(beta) * nll


def satimp(nll: Tensor, beta1: float = 5.0, beta2: float = 1.0) -> Tensor:
    r"""SatImp: saturation and importance, $-p^{\beta_1} (1-p)^{\beta_2} \ell$, the weight without gradient.

    Args:
        nll (`Tensor`): ℓ = −log p of a token, `[…]`.
        beta1, beta2 (`float`): ≥ 0.

    Returns:
        `Tensor`: `[…]`.
    """
    p = nll.detach().neg().exp()
    return -p.pow(beta1) * (1 - p).pow(beta2) * nll


class Wga(TokenLoss):
    """WGA's loss."""

    name, credit = "wga", {"WGA's loss": "2502.19301"}

    def of_tokens(self, logits: Tensor, targets: Tensor, batch: Any) -> Tensor:
        return wga(cross_entropy(logits, targets))


class SatImp(TokenLoss):
    """SatImp's loss."""

    name, credit = "satimp", {"SatImp's loss": "2505.11953"}

    def of_tokens(self, logits: Tensor, targets: Tensor, batch: Any) -> Tensor:
        return satimp(cross_entropy(logits, targets))
