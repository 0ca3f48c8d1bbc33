"""What the two players of a GAN want, as functions of logits and images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real: Tensor, drawn: Tensor) -> Tensor:
    """Logistic loss, a mean over each: $-E\\log\\sigma(D(x)) - E\\log(1-\\sigma(D(G(z))))$ (arXiv 1406.2661, eq. 1).

    Args:
        real, drawn (`Tensor`): logits, `[n]`, `[m]`.
    """
    return F.softplus(-real).mean() + F.softplus(drawn).mean()


def generator_loss(drawn: Tensor) -> Tensor:
    """The non-saturating loss: $-E\\log\\sigma(D(G(z)))$ (arXiv 1406.2661, §3)."""
    return F.softplus(-drawn).mean()


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """½ E‖∇ₓD(x)‖², with a graph of its own (R1, arXiv 1801.04406, eq. 9).

    Args:
        logits (`Tensor`): `[n]`, of `images`.
        images (`Tensor`): `[n, …]`, which require a gradient.
    """
    (slope,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return 0.5 * slope.square().flatten(1).sum(1).mean()


def path_lengths(images: Tensor, styles: Tensor, generator: torch.Generator) -> Tensor:
    """‖Jᵀy‖ for a random image y, with a graph of its own: how far an image moves with its style (arXiv 1912.04958, eq. 4).

    Args:
        images (`Tensor`): `[n, channels, height, width]`, of `styles`.
        styles (`Tensor`): w, `[n, …]`, part of the images' graph.
        generator (`torch.Generator`): of y, on the images' device.

    Returns:
        `Tensor`: `[n]`.
    """
    noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    noise = noise / (images.shape[2] * images.shape[3]) ** 0.5
    (slope,) = torch.autograd.grad((images * noise).sum(), styles, create_graph=True)
    return torch.linalg.vector_norm(slope.flatten(1), dim=1)  # whose gradient at zero is zero
