"""PDU: the weight of what is kept is the dual variable of a limit on its loss (arXiv 2506.05314)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Dual:
    r"""λ, which rises while the loss of what is kept is above its limit: $\lambda \leftarrow \max(0, \lambda + \eta\,(\ell_R - \varepsilon))$
    after every optimiser step.

    Args:
        weight (`float`): λ as it begins.
        limit (`float`): ε, nats.
        rate (`float`): η, per step.
    """

    def __init__(self, weight: float, limit: float, rate: float):
        self.weight, self.limit, self.rate = weight, limit, rate
        self._losses: list[Tensor] = []

    def saw(self, loss: Tensor) -> None:
        """Note the loss of a micro-batch, a scalar."""
        self._losses.append(loss.detach())

    def step(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Move λ by the mean loss of the micro-batches since the last step.

        Args:
            mean (callable): the mean over all processes of a scalar.
        """
        loss = mean(torch.stack(self._losses).mean()).item()
        self._losses.clear()
        self.weight = max(0.0, self.weight + self.rate * (loss - self.limit))

    def to_json(self) -> dict[str, float]:
        """What a resumed run needs to know."""
        return {"weight": self.weight, "limit": self.limit, "rate": self.rate}
