"""DPO: another answer is preferred to the one that is to go; refused (IdkDPO), written by the original (AltPO), or given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...training.collators import ALTERNATE
from ..forget_loss import Npo
from ..losses import npo


def dpo(
    nll: Tensor, reference_nll: Tensor, alternate_nll: Tensor, alternate_reference_nll: Tensor, beta: float = 0.1
) -> Tensor:
    r"""Another answer $y'$ is preferred to the answer (DPO, arXiv 2305.18290, on the scale of NPO, which is the case without $y'$):
    $-\frac2\beta \log\sigma\big(\beta\,(\log\frac{\pi(y')}{\pi^*(y')} - \log\frac{\pi(y)}{\pi^*(y)})\big)$.

    Args:
        nll, reference_nll (`Tensor`): −log π of the whole answer, `[rows]`.
        alternate_nll, alternate_reference_nll (`Tensor`): of the whole answer that is wanted instead, `[rows]`.
        beta (`float`): inverse temperature > 0.

    Returns:
        `Tensor`: `[rows]`.
    """
    return npo(nll - alternate_nll, reference_nll - alternate_reference_nll, beta)


class Dpo(Npo):
    """DPO's loss, divided as NPO's is by the tokens of the answer that is to go."""

    name, credit, of_texts, paired = "dpo", {"DPO's loss": "2305.18290"}, True, True

    def check(self) -> None:
        if not self.trainer.has_alternates:
            raise ValueError(
                f"forget_dataset: has no column '{ALTERNATE}', which forget_loss={self.name!r} needs; give the answers that are wanted "
                "instead there"
            )

    def means(self, model: Callable, batch: Any) -> Tensor:
        *nlls, count = self.trainer.of_whole_texts(model, batch)
        *alternate_nlls, _ = self.trainer.of_whole_texts(model, batch[ALTERNATE])
        return dpo(*nlls, *alternate_nlls, self.args.preference_beta) / count


class IdkDpo(Dpo):
    """DPO's, where "I don't know" is preferred."""

    name, credit = "idkdpo", Dpo.credit | {"TOFU's preference for not knowing": "2401.06121"}


class AltPo(Dpo):
    """DPO's, where an answer is preferred that the original made up."""

    name, credit = "altpo", Dpo.credit | {"AltPO's answers": "2409.13474"}
