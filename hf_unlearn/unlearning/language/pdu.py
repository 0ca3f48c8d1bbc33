"""PDU: logits become flat, and the weight of what is kept is the dual variable of a limit on its loss (arXiv 2506.05314)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .tokens import TokenLoss


def pdu(logits: Tensor) -> Tensor:
    r"""How far the logits are from flat: $(\max_c z_c - \bar z)^2$; `[…, vocabulary] -> […]`."""
    logits = logits.float()
    return (logits.amax(-1) - logits.mean(-1)).square()


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


class Pdu(TokenLoss):
    """PDU's loss. What utility may fall to is the limit: the original's loss on what is kept, and `utility_tolerance`."""

    name, credit = "pdu", {"PDU's loss": "2506.05314"}
    settings = (*TokenLoss.settings, "pdu_rate")
    watches_kept = True
    dual: Dual | None = None

    def check(self) -> None:
        if self.trainer.retain_dataset is None:
            raise ValueError(
                "retain_dataset: missing, whose loss is the limit of forget_loss='pdu'; pass rows to keep"
            )

    def of_tokens(self, logits: Tensor, targets: Tensor, batch: Any) -> Tensor:
        return pdu(logits)

    @property
    def retain_weight(self) -> float:
        return self.dual.weight if self.dual else super().retain_weight

    def begin(self, state: dict[str, float] | None = None) -> None:
        trainer = self.trainer
        if state is not None:
            self.dual = Dual(**state)
            return
        original = trainer.mean_of(
            lambda batch: self.retain_loss(trainer.reference_forward, batch), trainer.retain_dataset
        )
        self.dual = Dual(self.args.retain_weight, original + trainer.utility_tolerance, self.args.pdu_rate)

    def saw(self, kept: Tensor) -> None:
        self.dual.saw(kept)

    def stepped(self) -> None:
        self.dual.step(lambda value: self.trainer.accelerator.reduce(value, "mean"))

    def state(self) -> dict[str, float]:
        return self.dual.to_json()

    def logged(self) -> dict[str, float]:
        return {"retain_weight": self.dual.weight}
