"""Forget losses: what a model is asked to say instead. Pure functions; each returns one value per example (or batch)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def ascent(loss: Tensor) -> Tensor:
    """−ℓ: gradient ascent. It has no lower bound, so something else must stop it."""
    return -loss


def npo(nll: Tensor, reference_nll: Tensor, beta: float = 0.1) -> Tensor:
    r"""Negative preference optimisation (arXiv 2404.05868, eq. 3): $-\frac2\beta \log\sigma\big(-\beta \log\frac{\pi_\theta}{\pi_{ref}}\big)$.

    Args:
        nll, reference_nll (`Tensor`): −log π(y|x) of model and reference, `[batch]`.
        beta (`float`): inverse temperature > 0; β → 0 is gradient ascent.

    Returns:
        `Tensor`: `[batch]`, ≥ 0, tends to 0 as the example is forgotten.
    """
    return 2 / beta * F.softplus(beta * (reference_nll - nll))


def redirect(logits: Tensor, reference_logits: Tensor, excluded: Tensor) -> Tensor:
    r"""Cross-entropy to what the original would have said without the forgotten classes:
    $-\sum_{c \notin \mathcal F} \tilde p^*_c \log p_c$, with $\tilde p^*$ the original's distribution renormalised without $\mathcal F$.

    Bounded below, and it says where the forgotten inputs should go. It is the loss of DELETE (Decoupled Distillation to Erase,
    CVPR 2025, arXiv 2503.23751): the forgotten logit to −∞, the frozen original's softmax as target, forget data alone.

    Args:
        logits, reference_logits (`Tensor`): `[…, classes]`; computed in fp32.
        excluded (`Tensor`): bool, `[classes]` or `[…, classes]`; at least one class must remain.

    Returns:
        `Tensor`: `[…]`.
    """
    target = reference_logits.float().masked_fill(excluded, -torch.inf).softmax(-1)
    return -(target * logits.float().log_softmax(-1)).masked_fill(target == 0, 0).sum(-1)  # 0 · log 0 = 0


def uniform(logits: Tensor) -> Tensor:
    r"""KL(U ‖ p) from the uniform distribution over all classes: 0 when the model says nothing. `[…, classes] -> […]`."""
    log_p = logits.float().log_softmax(-1)
    return -log_p.mean(-1) - math.log(log_p.shape[-1])


def match(loss: Tensor, target: float) -> Tensor:
    r"""$|\bar\ell - \ell_{held\,out}|$: deleted examples should look like data the model has never seen, no worse.

    Args:
        loss (`Tensor`): per-example losses of the batch, `[batch]`.
        target (`float`): mean loss of held-out data of the same kind.

    Returns:
        `Tensor`: a scalar, since it is the mean that has to match.
    """
    return (loss.mean() - target).abs()


def divergence(logits: Tensor, reference_logits: Tensor, excluded: Tensor | None = None) -> Tensor:
    r"""KL(p* ‖ p) from the original's distribution to the student's, over the classes that are to be kept.

    Args:
        logits, reference_logits (`Tensor`): `[…, classes]`; computed in fp32.
        excluded (`Tensor`, *optional*): `[classes]` bool, forgotten classes: both distributions are renormalised
            without them, so that replay says nothing about what is to be forgotten.

    Returns:
        `Tensor`: `[…]`, nats, ≥ 0 up to rounding.
    """
    logits, reference_logits = logits.float(), reference_logits.float()
    if excluded is not None:
        logits, reference_logits = logits[..., ~excluded], reference_logits[..., ~excluded]
    log_p, log_q = reference_logits.log_softmax(-1), logits.log_softmax(-1)
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(-1)
