r"""What a guided sampler is to hear when a concept is gone: with words that name it, and without words.

A sampler with guidance scale s follows ε(∅) + s (ε(c) − ε(∅)), and draws from ε(∅) alone where it is told nothing. An original that knows the
concept draws it without words, too: ε(∅) is the mean of what it would answer for each thing that the picture may become, weighted by how probable that
is. Of that mean the concept's part is to be answered as the anchor a,

$$ \varepsilon^*(\varnothing) = \varepsilon(\varnothing) - q\,\big(\varepsilon(c) - \varepsilon(a)\big), \qquad
   q = \mathrm{clip}_{[0, 1]} \frac{\lVert \varepsilon(\varnothing) - \varepsilon(a) \rVert^2 - \lVert \varepsilon(\varnothing) - \varepsilon(c) \rVert^2}
   {\lVert \varepsilon(c) - \varepsilon(a) \rVert^2}, $$

where q says how much nearer ε(∅) is to the concept's answer than to the anchor's: 1 where it is the concept's, 0 in the middle between both, where all other
things are as well if they differ from both alike. Guidance would then miss, s − 1 times, what ε(∅) has lost, so each image is shown with words and
without, and the *guided* answer is asked to be the original's: for the concept that to the anchor, ε(∅) + s (ε(a) − ε(∅)), for what is kept its own.

Kin: concept ablation (arXiv 2303.13516) redirects c to a alone; ESD (arXiv 2303.07345) goes beyond ε(∅) by a chosen η, everywhere alike; classifier-free
guidance is of arXiv 2207.12598.
"""

from __future__ import annotations

import torch
from torch import Tensor


def concept_share(unprompted: Tensor, concept: Tensor, instead: Tensor) -> Tensor:
    """q, `[batch, 1, …]`, 0 where concept and anchor are answered alike.

    Args:
        unprompted, concept, instead (`Tensor`): ε(∅), ε(c) and ε(a) of the original on the same noisy images, `[batch, …]`.
    """
    dims = tuple(range(1, unprompted.ndim))
    apart = (concept - instead).square().sum(dims, keepdim=True)
    nearer = (unprompted - instead).square().sum(dims, keepdim=True) - (unprompted - concept).square().sum(
        dims, keepdim=True
    )
    return torch.where(apart > 0, nearer / apart, 0.0).clamp(0, 1)


def without_concept(unprompted: Tensor, concept: Tensor, instead: Tensor) -> Tensor:
    """ε*(∅), what is to be answered without words, `[batch, …]`. Arguments as of [`concept_share`]."""
    return unprompted - concept_share(unprompted, concept, instead) * (concept - instead)
