"""SimNPO: NPO without a reference (arXiv 2410.07163)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..forget_loss import ForgetLoss


def simnpo(nll: Tensor, beta: float = 4.5, delta: float = 0.0) -> Tensor:
    r"""On the mean over tokens: $-\frac2\beta \log\sigma\big(\beta\,(\bar\ell - \delta)\big)$.

    Args:
        nll (`Tensor`): mean over the answer's tokens, `[rows]`.
        beta (`float`): inverse temperature > 0.
        delta (`float`): margin δ, nats.

    Returns:
        `Tensor`: `[rows]`.
    """
    return 2 / beta * F.softplus(-beta * (nll - delta))


class SimNpo(ForgetLoss):
    """SimNPO's loss of each text."""

    name, of_texts = "simnpo", True
    credit = {"SimNPO's loss": "2410.07163"}

    def means(self, model: Callable, batch: Any) -> Tensor:
        return simnpo(self.trainer.task_loss(model, batch))
