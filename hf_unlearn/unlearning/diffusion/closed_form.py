r"""The closed form by which linear layers that read text answer one wording as another.

A denoiser reads words by linear layers. For every wording p that names the concept there is one, a(p), that names an anchor in its place. At
every token position a layer is to answer the one as it answered the other, W' h_p = W h_a, and all that is kept as before, W' h = W h:

$$ W' = \Big(W\,\big[\Sigma_{ap} + w K + \lambda I\big]\Big)\big[\Sigma_{pp} + w K + \lambda I\big]^{-1}
      = W + W\,\underbrace{(\Sigma_{ap} - \Sigma_{pp})\,\big[\Sigma_{pp} + w K + \lambda I\big]^{-1}}_{D} $$

with $\Sigma_{pp} = \frac{1}{|F|} \sum h_p h_p^\top$, $\Sigma_{ap} = \frac{1}{|F|} \sum h_a h_p^\top$ and $K = \frac{1}{|K|} \sum h h^\top$ over the
kept. D is one matrix for all layers that read the same text. Of several concepts the $\Sigma$ are added: one does not weaken another.

Kin: TIME (arXiv 2303.08084) and UCE (arXiv 2308.14761) edit keys and values of cross-attention in this form, MACE (arXiv 2403.06135) many
concepts at once and at each token, SPEED (arXiv 2503.07392) in the null space of what is kept; anchors are of concept ablation (arXiv 2303.13516).
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def regression(change: Tensor, here: Tensor, kept: Tensor, ridge: Tensor) -> Tensor:
    """D = (Σ_ap − Σ_pp)(Σ_pp + w K + λ I)⁻¹, `[width, width]`.

    Args:
        change (`Tensor`): Σ_ap − Σ_pp, `[width, width]`, like all of them in float64.
        here (`Tensor`): Σ_pp.
        kept (`Tensor`): w K.
        ridge (`Tensor`): λ > 0, a scalar.

    Raises:
        ValueError: the ridge is too small to solve for D.
    """
    system = here + kept
    system.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:
        raise ValueError("ridge: is too small for these text states, whose directions depend on each other; raise it")
    return torch.cholesky_solve(change.T, factor).T


@torch.no_grad()
def in_null_space(change: Tensor, here: Tensor, kept: Tensor, ridge: Tensor) -> Tensor:
    """The same, of what is orthogonal to all directions Q in which what is kept is stronger than the ridge (SPEED, arXiv 2503.07392, without
    its choice and augmentation of kept prompts): D = (Σ_ap − Σ_pp) Q (Qᵀ Σ_pp Q + λ I)⁻¹ Qᵀ. Arguments as of [`regression`].

    Raises:
        ValueError: the concept has nothing in such directions, or there are none.
    """
    strengths, directions = torch.linalg.eigh(kept)
    free = directions[:, strengths <= ridge]
    inside = free.T @ here @ free
    if inside.diagonal().sum() <= ridge:  # nothing of the concept is there, or there are no such directions
        raise ValueError(
            "null_space: what is kept fills every direction that the concept's wordings have; keep less, raise ridge or set null_space=False"
        )
    return regression(change @ free, inside, torch.zeros_like(inside), ridge) @ free.T


@torch.no_grad()
def low_rank(change: Tensor, second: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`(out, down)`, `[outputs, rank]` and `[rank, width]`, whose product is the nearest to `change` on states with a second moment: reduced-rank
    regression, U Uᵀ C with U the first left singular vectors of C S^{1/2}.

    Args:
        change (`Tensor`): C, `[outputs, width]`.
        second (`Tensor`): S, `[width, width]`.
        rank (`int`): ≥ 1; at most the smaller size of C is used.
    """
    rank = min(rank, *change.shape)
    answers = change @ second.to(change) @ change.T
    directions = torch.linalg.eigh(answers)[1][:, -rank:]
    return directions, directions.T @ change
