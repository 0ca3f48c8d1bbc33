"""What a frozen model says at many places, kept as its likeliest tokens and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


TOP = 64  # tokens of a distribution that are kept by name


@dataclass
class Targets:
    """Distributions at the places that count, row after row.

    Attributes:
        begins (`Tensor`): `[rows + 1]`; row i has the places `begins[i] … begins[i + 1] − 1`.
        tokens (`Tensor`): `[places, k]`, int32, the likeliest tokens.
        log_p (`Tensor`): `[places, k + 1]`, float32: theirs, and of all others together.
        answer_log_p (`Tensor`): `[places]`, of the token that stands there.
    """

    begins: Tensor
    tokens: Tensor
    log_p: Tensor
    answer_log_p: Tensor

    def places(self, rows: Sequence[int]) -> Tensor:
        """Places of several rows, one row after the other."""
        return torch.cat([torch.arange(self.begins[row], self.begins[row + 1]) for row in rows])

    def at(self, rows: Sequence[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """`tokens` and `log_p` of several rows."""
        places = self.places(rows)
        return self.tokens[places].to(device), self.log_p[places].to(device)

    @property
    def megabytes(self) -> float:
        """Memory and file that they take."""
        return sum(part.nbytes for part in vars(self).values()) / 1e6

    @property
    def lost(self) -> float:
        """Mean probability of the tokens that are not kept by name."""
        return float(self.log_p[:, -1].exp().mean())


def likeliest(logits: Tensor, top: int = TOP) -> tuple[Tensor, Tensor]:
    """The likeliest tokens `[places, k]` and the logarithms of their probabilities and of the rest's, `[places, k + 1]`."""
    log_p = logits.float().log_softmax(-1)
    values, tokens = log_p.topk(min(top, log_p.shape[-1] - 1), dim=-1)
    rest = log_p.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return tokens.int(), torch.cat([values, rest], -1)


def divergence_from(logits: Tensor, tokens: Tensor, log_p: Tensor) -> Tensor:
    r"""KL(target ‖ model) with all tokens that are not kept by name taken as one, `[places]`, nats; at most the whole KL, and equal to it
    where nothing is left out.

    Args:
        logits (`Tensor`): the model's, `[places, vocabulary]`.
        tokens, log_p (`Tensor`): of [`likeliest`].
    """
    logits = logits.float()
    tokens = tokens.long()
    log_z = logits.logsumexp(-1, keepdim=True)
    rest = logits.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    log_q = torch.cat([logits.gather(-1, tokens), rest], -1) - log_z
    p = log_p.exp()
    return (p * (log_p - log_q)).masked_fill(p == 0, 0).sum(-1)
