r"""The field's forget losses for language models, beside those of [`hf_unlearn.unlearning.losses`]. Pure functions, with the papers' settings.

`nll` is −log π of a token, `[rows, tokens]`, or the mean over an answer, `[rows]`. Losses of tokens give one value a token; which tokens count and
how they are averaged is the trainer's business. All are equal to open-unlearning's (arXiv 2506.12618) where nothing is padded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import npo, redirect


def undial(logits: Tensor, reference_logits: Tensor, targets: Tensor, beta: float = 10.0) -> Tensor:
    r"""Cross-entropy to the original with the answer's own logit lowered (UNDIAL, arXiv 2402.10052): $-\sum_c q_c \log p_c$, $q =
    \mathrm{softmax}(z^* - \beta\,1_y)$. `redirect` is the case β → ∞.

    Args:
        logits, reference_logits (`Tensor`): `[rows, tokens, vocabulary]`.
        targets (`Tensor`): the answer, `[rows, tokens]`; −100 lowers nothing.
        beta (`float`): how far the logit is lowered.

    Returns:
        `Tensor`: `[rows, tokens]`.
    """
    lowering = torch.where(targets >= 0, -beta, 0.0).unsqueeze(-1)
    target = reference_logits.float().scatter_add(-1, targets.clamp(min=0).unsqueeze(-1), lowering).softmax(-1)
    return -(target * logits.float().log_softmax(-1)).sum(-1)


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


def simnpo(nll: Tensor, beta: float = 4.5, delta: float = 0.0) -> Tensor:
    r"""NPO without a reference, on the mean over tokens (SimNPO, arXiv 2410.07163): $-\frac2\beta \log\sigma\big(\beta\,(\bar\ell - \delta)\big)$.

    Args:
        nll (`Tensor`): mean over the answer's tokens, `[rows]`.
        beta (`float`): inverse temperature > 0.
        delta (`float`): margin δ, nats.

    Returns:
        `Tensor`: `[rows]`.
    """
    return 2 / beta * F.softplus(-beta * (nll - delta))


def wga(nll: Tensor, beta: float = 1.0) -> Tensor:
    r"""Ascent weighted by how likely the token still is (WGA, arXiv 2502.19301): $-p^\beta \ell$, the weight without gradient; `[rows, tokens]`."""
    return -nll.detach().neg().exp().pow(beta) * nll


def satimp(nll: Tensor, beta1: float = 5.0, beta2: float = 1.0) -> Tensor:
    r"""Ascent weighted by saturation and importance (SatImp, arXiv 2505.11953): $-p^{\beta_1} (1-p)^{\beta_2} \ell$; `[rows, tokens]`."""
    p = nll.detach().neg().exp()
    return -p.pow(beta1) * (1 - p).pow(beta2) * nll


def rmu(hidden: Tensor, target: Tensor) -> Tensor:
    r"""Distance of hidden states from where they are to be (RMU, arXiv 2403.03218): $\frac1d\lVert h - t \rVert^2$, with $t = c\,u$ for what is to be
    forgotten, and the original's own for what is to be kept; `[rows, tokens, size]` and one that broadcasts to it -> `[rows, tokens]`.
    """
    return (hidden.float() - target.float()).square().mean(-1)


def pdu(logits: Tensor) -> Tensor:
    r"""How far the logits are from flat (PDU, arXiv 2506.05314): $(\max_c z_c - \bar z)^2$; `[rows, tokens, vocabulary] -> [rows, tokens]`."""
    logits = logits.float()
    return (logits.amax(-1) - logits.mean(-1)).square()


def ceu(logits: Tensor, targets: Tensor) -> Tensor:
    r"""[`redirect`] to the student's own distribution in the original's place, which takes no gradient (CE-U, arXiv 2503.01224).

    Args:
        logits (`Tensor`): `[rows, tokens, vocabulary]`.
        targets (`Tensor`): `[rows, tokens]`; −100 takes nothing away.

    Returns:
        `Tensor`: `[rows, tokens]`.
    """
    own = torch.zeros_like(logits, dtype=torch.bool)
    own.scatter_(-1, targets.clamp(min=0).unsqueeze(-1), (targets >= 0).unsqueeze(-1))
    return redirect(logits, logits.detach(), own)
