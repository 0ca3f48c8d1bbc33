"""SPEED: a concept's last token read as another's, in the null space of what is kept (arXiv 2503.07392, ICLR 2026)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from ...modes import seeded_generator
from ...training.checks import check_number
from .asked_concepts import by_last_words, kept_without
from .closed_form import regression
from .pipelines import text_side_of
from .text_moments import last_words
from .text_side import TOKENS, TextSide
from .wordings import kept_prompts


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


CENTRES = 3  # of the empty prompt's states behind its first one


@torch.no_grad()
def speed(
    pipe: DiffusionPipeline,
    concept: str | Sequence[str] | Mapping[str, str],
    *,
    anchor: str | Sequence[str] | Mapping[str, str] | None = "",
    wordings: Sequence[str] = ("{}",),
    keep: Sequence[str] | None = None,
    keys: bool = False,
    retain_filter: bool = True,
    augment: int = 10,
    threshold: float = 0.1,
    retain_scale: float = 1.0,
    lamb: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
) -> DiffusionPipeline:
    r"""Change a text-to-image pipeline in place by SPEED: each layer that reads text is to answer the state c of a concept's last token as it
    answered the anchor's c*, by a change that is orthogonal to what is kept and leaves the empty prompt alone.

    $$ \Delta = W (\Sigma_{*c} - \Sigma_{cc})\,\big[G - G K_2 (K_2^\top G K_2 + \lambda I)^{+} K_2^\top G\big], \qquad
       G = Q\,(Q^\top \Sigma_{cc}\, Q + s I)^{-1} Q^\top $$

    with Σ means over the concepts, and Q the directions in which the second moment of what is kept is below a threshold. Of each layer's kept
    states count those that the plain edit $W(\Sigma_{*c} - \Sigma_{cc})(I + \Sigma_{cc})^{-1}$ moves more than the mean (influence-based prior
    filtering); beside them stand copies with noise along the layer's last singular direction, those that it moves more than their mean (directed
    prior augmentation). $K_2$ holds the empty prompt's first state and three centres of its others (invariant equality constraints).

    Args:
        pipe, concept: as of [`redirect_concept`].
        anchor, wordings: as of [`uce`].
        keep (`Sequence[str]`, *optional*): prompts whose last token is kept. Default: some thousand made from short lists of words.
        keys (`bool`, defaults to `False`): change keys of cross-attention too, not only values.
        retain_filter (`bool`, defaults to `True`): keep those that the plain edit moves most, not all; all are better where they are few.
        augment (`int`, defaults to 10): noisy copies of each; 0 for none.
        threshold (`float`, defaults to 0.1): of the second moment, in its own unit.
        retain_scale (`float`, defaults to 1.0): s.
        lamb (`float`, defaults to 0.0): λ.
        seed (`int`, defaults to 0): of the noise and the centres.
        batch_size (`int`, defaults to 16): prompts encoded at once.

    Returns:
        `DiffusionPipeline`: `pipe`.

    Raises:
        ValueError: as of [`redirect_concept`], or what is kept leaves no direction. Nothing was changed.
    """
    rules = (
        ("augment", augment, "≥ 0"),
        ("lamb", lamb, "≥ 0"),
        ("threshold", threshold, "> 0"),
        ("retain_scale", retain_scale, "> 0"),
    )
    for rule in rules:
        check_number(*rule)
    side = text_side_of(pipe)
    anchors, _, asked, instead = by_last_words(side, concept, anchor, wordings, batch_size)
    names = list(anchors)
    kept = last_words(side, kept_prompts(names) if keep is None else kept_without(side, keep, names), batch_size)
    if not kept:
        raise ValueError("keep: there is nothing to keep, and SPEED is in its null space; name prompts")
    invariant, generator, changes = _invariants(side, seed), seeded_generator("cpu", seed), []
    for layer in side.layers:
        if layer.name.endswith("to_k") and not keys:
            continue
        states = asked[layer.stream]
        here = states.T @ states / len(states)
        change = (instead[layer.stream] - states).T @ states / len(states)
        plain = regression(change, here, torch.zeros_like(here), here.new_tensor(1.0))
        weight = layer.linear.weight[:, : layer.width].double()
        moment = _refined(kept[layer.stream], weight, weight @ plain, retain_filter, int(augment), generator)
        strengths, directions = torch.linalg.eigh(moment)
        free = directions[:, strengths < threshold]
        if not free.shape[1]:
            raise ValueError(f"keep: fills every direction of {layer.name}; keep less, or raise threshold")
        inner = free.T @ here @ free + retain_scale * torch.eye(free.shape[1]).to(here)
        inside = free @ torch.linalg.solve(inner, free.T)
        fixed = invariant.get(layer.stream, here[:, :0])
        moved = inside @ fixed
        system = fixed.T @ moved + lamb * torch.eye(fixed.shape[1]).to(here)
        held = torch.linalg.pinv(system, atol=1e-12 * fixed.square().sum().item(), hermitian=True)
        changes.append((layer, weight @ change @ (inside - moved @ held @ moved.T)))
    for layer, change in changes:
        text = layer.linear.weight[:, : layer.width]
        text.copy_(text.double() + change)
    pipe.maybe_free_model_hooks()  # what is offloaded goes back
    return pipe


def _invariants(side: TextSide, seed: int) -> dict[str, Tensor]:
    """What no change may move, `[width, count]` by stream: the empty prompt's first state and centres of its others."""
    told = side.told([""])
    states = told.tokens[told.attended].double()
    first, others = states[:1], states[1:]
    if len(others) > CENTRES:
        means = KMeans(CENTRES, n_init=1, random_state=seed).fit(others.cpu().numpy()).cluster_centers_
        others = torch.from_numpy(means).to(others)
    found = {TOKENS: torch.cat([first, others]).T}
    return found | {stream: rows[0].double().T for stream, rows in told.streams.items() if stream != TOKENS}


def _refined(
    kept: Tensor, weight: Tensor, edit: Tensor, retain_filter: bool, augment: int, generator: torch.Generator
) -> Tensor:
    """Second moment of the kept states that an edit of a layer moves most, and of noisy copies, `[width, width]`."""
    influence = (kept @ edit.T).norm(dim=1)
    chosen = kept[influence > influence.mean()] if retain_filter and augment else kept
    along = torch.linalg.svd(weight, full_matrices=False).Vh[-1]
    noise = torch.randn(augment, len(chosen), generator=generator, dtype=torch.float64).to(kept.device)
    step, moved = chosen @ edit.T, edit @ along
    # |edit (h + z v)|² without the copies themselves, of which there are many.
    away = step.square().sum(1) + 2 * noise * (step @ moved) + noise.square() * moved.square().sum()
    taken = (far := away.clamp(min=0).sqrt()) > far.mean()
    noise, counts = noise * taken, taken.sum(0).double()
    mixed = torch.outer(noise.sum(0) @ chosen, along)
    total = chosen.T @ ((1 + counts)[:, None] * chosen) + mixed + mixed.T
    total += noise.square().sum() * torch.outer(along, along)
    return total / (len(chosen) + counts.sum())
