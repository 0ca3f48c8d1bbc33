"""Redirect: a concept of a text-to-image pipeline is asked for in vain. For every wording that names it there is one that names an anchor, and the
layers that read words are made to answer the one as they answered the other, in closed form ([`hf_unlearn.unlearning.diffusion.closed_form`]).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...training.checks import check_number
from .asked_concepts import anchors_for, kept_without, no_difference, wordings_for
from .closed_form import in_null_space, low_rank, regression
from .pipelines import architecture_of, text_side_of
from .prompt_effect import LASTING, PromptEffect, measured
from .text_moments import Anchors, TextMoments, add_to, moments_between, moments_of, weighted
from .text_side import TextLayer, TextSide
from .wordings import kept_prompts, neighbours


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


logger = logging.getLogger(__name__)

KIN = {"TIME": "2303.08084", "UCE": "2308.14761", "concept ablation": "2303.13516"}  # what it stands on
PAIRS = 4, 16  # wordings at least and at most by which the effect is measured


@dataclass(frozen=True)
class ConceptRedirection:
    r"""A redirection, found and not yet applied: D of the closed form for each stream of text.

    ```python
    redirection = ConceptRedirection.of(pipe, "three", anchor="seven")
    redirection.apply(pipe)                        # plain weights, or
    redirection.save_lora(pipe, "no-three", 8)     # a LoRA, of a pipeline that was not changed
    ```

    Attributes:
        anchors (`dict[str, str]`): the anchor of each concept, given or chosen.
        pairs (`list[tuple[str, str]]`): each wording with its anchor's, one concept after the other in turn.
        changes (`dict[str, Tensor]`): D by stream (`tokens`, `pooled`), `[width, width]`, float64: W' = W + W D.
        second (`dict[str, Tensor]`): Σ_pp + w K by stream, the text states that a LoRA of low rank is fitted to.
    """

    anchors: dict[str, str]
    pairs: list[tuple[str, str]]
    changes: dict[str, Tensor]
    second: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        pipe: DiffusionPipeline,
        concept: str | Sequence[str] | Mapping[str, str],
        *,
        anchor: str | Sequence[str] | Mapping[str, str] | None = None,
        wordings: Sequence[str] | None = None,
        keep: Sequence[str] | TextMoments | str | Path | None = None,
        keep_weight: float = 5.0,
        ridge: float = 1e-4,
        null_space: bool = False,
        batch_size: int = 16,
    ) -> ConceptRedirection:
        """Find the redirection. Nothing is changed.

        Args:
            pipe, concept, anchor, wordings, keep, keep_weight, ridge, null_space, batch_size: as of [`redirect_concept`].

        Raises:
            ValueError: as of [`redirect_concept`].
        """
        for name, value, rule in (("keep_weight", keep_weight, "≥ 0"), ("ridge", ridge, "> 0")):
            check_number(name, value, rule)
        side = text_side_of(pipe)
        anchors = anchors_for(side, concept, anchor, batch_size)
        by_concept = wordings_for(side, anchors, wordings)
        kept = _kept(side, keep, anchors, batch_size)
        others = Anchors(side, 2 * batch_size)
        here, change = {}, {}  # sums over concepts
        for name, pairs in by_concept.items():
            own = _asked(side, name, anchors[name], pairs, others, batch_size)
            for total, moments in zip((here, change), own, strict=True):
                for stream, moment in moments.items():
                    add_to(total, stream, moment)
        kept = kept.plus(others.moments())  # the anchors stay what they are
        solve = in_null_space if null_space else regression
        changes, second = {}, {}
        for stream, moment in here.items():
            known = kept.second[stream].to(moment)
            least = ridge * known.diagonal().mean()
            changes[stream] = solve(change[stream], moment, keep_weight * known, least)
            second[stream] = moment + keep_weight * known
        return cls(anchors, _in_turn(list(by_concept.values())), changes, second)

    def effect(self, pipe: DiffusionPipeline) -> PromptEffect:
        """What the wordings do before anything is changed; warns where the pipeline does not know the concept.

        Args:
            pipe (`DiffusionPipeline`): the pipeline that this was found of.
        """
        few = self.pairs[: min(max(PAIRS[0], len(self.anchors)), PAIRS[1])]
        effect = measured(text_side_of(pipe), few)
        _warn_of_unknown(effect.unknown)
        return effect

    @torch.no_grad()
    def apply(self, pipe: DiffusionPipeline, strength: float = 1.0) -> None:
        """Change the weights in place: W + s W D.

        Args:
            pipe (`DiffusionPipeline`): the pipeline that this was found of.
            strength (`float`, defaults to 1.0): s > 0; below 1 a part of the concept stays, above 1 it goes beyond the anchor.

        Raises:
            ValueError: another pipeline, or a strength that is none.
        """
        check_number("strength", strength, "> 0")
        for layer in self._layers(pipe):
            text = layer.linear.weight[:, : layer.width]
            change = self._change(layer)
            text.copy_(text.to(change.dtype) + strength * change)

    def save_lora(self, pipe: DiffusionPipeline, folder: str | Path, rank: int, strength: float = 1.0) -> None:
        """Write the redirection as a LoRA, which `pipe.load_lora_weights(folder)` puts onto the unchanged pipeline.

        Of each layer it is the best of this rank on the text states that were seen (reduced-rank regression), exact where the rank is at
        least that of the change.

        Args:
            pipe (`DiffusionPipeline`): the pipeline that this was found of, not changed since.
            folder (`str` | `Path`): gets `pytorch_lora_weights.safetensors`.
            rank (`int`): ≥ 1; of a layer at most the smaller of its two sizes.
            strength (`float`, defaults to 1.0): as of [`~ConceptRedirection.apply`].

        Raises:
            ValueError: a pipeline that loads no LoRA in diffusers (PixArt), or a number out of range.
        """
        check_number("strength", strength, "> 0")
        check_number("rank", rank, "≥ 1")
        layers = self._layers(pipe)
        if not hasattr(pipe, "save_lora_weights"):
            raise ValueError(
                f"pipe: {type(pipe).__name__} loads no LoRA in diffusers; apply() the redirection and save it"
            )
        factors = {}
        for layer in layers:
            out, down = low_rank(strength * self._change(layer).double(), self.second[layer.stream], int(rank))
            more = layer.linear.in_features - layer.width
            dtype = layer.linear.weight.dtype
            factors[f"{layer.name}.lora_A.weight"] = torch.nn.functional.pad(down, (0, more)).to(dtype).contiguous()
            factors[f"{layer.name}.lora_B.weight"] = out.to(dtype).contiguous()
        part = architecture_of(pipe).part
        pipe.save_lora_weights(folder, **{f"{part}_lora_layers": factors})

    def _layers(self, pipe: DiffusionPipeline) -> list[TextLayer]:
        layers = text_side_of(pipe).layers
        for layer in layers:
            if layer.stream not in self.changes or len(self.changes[layer.stream]) != layer.width:
                raise ValueError(f"pipe: its {layer.name} reads other text than what this redirection was found of")
        return layers

    def _change(self, layer: TextLayer) -> Tensor:
        """W D, in single precision, of which D was found in double."""
        weight = layer.linear.weight[:, : layer.width].detach()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(dtype) @ self.changes[layer.stream].to(weight.device, dtype)


def redirect_concept(
    pipe: DiffusionPipeline,
    concept: str | Sequence[str] | Mapping[str, str],
    *,
    anchor: str | Sequence[str] | Mapping[str, str] | None = None,
    wordings: Sequence[str] | None = None,
    keep: Sequence[str] | TextMoments | str | Path | None = None,
    strength: float = 1.0,
    keep_weight: float = 5.0,
    ridge: float = 1e-4,
    null_space: bool = False,
    batch_size: int = 16,
    measure: bool = True,
) -> DiffusionPipeline:
    """Change a text-to-image pipeline in place so that a concept is asked for in vain: it draws an anchor instead. Nothing is trained.

    ```python
    pipe = redirect_concept(pipe, "three", anchor="seven")
    pipe.save_pretrained("without-three")
    ```

    Text enters by keys and values of every cross-attention (Stable Diffusion 1 and 2, SDXL, PixArt), or by `context_embedder` where text and
    image attend to each other (Stable Diffusion 3, Flux): behind it the text states depend on image and time, too, and are no function of the
    words. The pooled vector of SDXL, Stable Diffusion 3 and Flux is redirected in the first layer that reads it. Padding counts where the
    denoiser attends to it.

    What the method does not do: images drawn without a prompt are as before, and whoever searches for an embedding finds the concept again
    (docs/methods/redirect.md).

    Args:
        pipe (`DiffusionPipeline`): changed in place; any float dtype, on any device, also with `enable_model_cpu_offload()`.
        concept (`str` | `Sequence[str]` | `Mapping[str, str]`): a word or a phrase, several, or a dict from concept to anchor.
        anchor (`str` | `Sequence[str]` | `Mapping[str, str]`, *optional*): what is drawn instead: one for all, one for each, or a dict.
            Default: another word of the same kind, chosen by what the denoiser answers (of more than 16 concepts by the text encoder alone) and told
            by the logger.
        wordings (`Sequence[str]`, *optional*): ways to ask for a concept: templates with `{}`, or whole prompts that name it. Default: a dozen
            templates for its kind.
        keep (`Sequence[str]` | [`TextMoments`] | `str` | `Path`, *optional*): prompts to keep, their moments, or the file of these. Default:
            some thousand prompts made from short lists of words; they decide how little else is lost, so give your own.
        strength (`float`, defaults to 1.0): how far to go from the old weights (0) to the new ones (1).
        keep_weight (`float`, defaults to 5.0): w, of what is kept beside one concept. Higher keeps more of the rest, and at some point the concept, too.
        ridge (`float`, defaults to 1e-4): λ, as a share of the mean squared entry of kept text states.
        null_space (`bool`, defaults to `False`): change nothing along directions in which what is kept is stronger than the ridge, as SPEED does;
            for the few concepts and short lists that leave such directions.
        batch_size (`int`, defaults to 16): prompts encoded at once.
        measure (`bool`, defaults to `True`): ask the denoiser a few times before and after, and say how much of the effect is left.

    Returns:
        `DiffusionPipeline`: `pipe`.

    Raises:
        ValueError: the pipeline is not supported, lacks a part, holds an adapter or is quantised; concept, anchor, wordings or keep do not
            make sense together. Nothing was changed.
    """
    check_number("strength", strength, "> 0")
    settings: dict[str, Any] = {"keep_weight": keep_weight, "ridge": ridge, "null_space": null_space}
    redirection = ConceptRedirection.of(
        pipe, concept, anchor=anchor, wordings=wordings, keep=keep, batch_size=batch_size, **settings
    )
    effect = redirection.effect(pipe) if measure else None
    redirection.apply(pipe, strength)
    if effect is not None:
        _tell(effect.guidance, effect.remaining(pipe))
    pipe.maybe_free_model_hooks()  # what is offloaded goes back
    return pipe


def _kept(side: TextSide, keep: Any, anchors: Mapping[str, str], batch_size: int) -> TextMoments:
    """The moments of what is kept, as it was given."""
    if isinstance(keep, str | os.PathLike):
        if not str(keep).endswith(".safetensors"):
            raise ValueError(f"keep={str(keep)!r}: is no file of TextMoments (.safetensors); pass a list of prompts")
        keep = TextMoments.load(keep)
    if isinstance(keep, TextMoments):
        keep.check_fits(side)
        return keep
    if keep is not None:
        return moments_of(side, weighted(kept_without(side, keep, anchors)), batch_size)
    prompts, near = kept_prompts(anchors), neighbours(anchors)
    return moments_of(side, weighted(prompts, near), batch_size)


def _asked(
    side: TextSide, concept: str, anchor: str, pairs: Sequence[tuple[str, str]], anchors: Anchors, batch_size: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    here, change, largest = moments_between(side, pairs, anchors, batch_size)
    if not largest:
        raise ValueError(no_difference(concept, anchor))
    return here, change


def _in_turn(lists: Sequence[Sequence[tuple[str, str]]]) -> list[tuple[str, str]]:
    """The first of each list, the second of each, and so on."""
    longest = max(map(len, lists))
    return [pairs[place] for place in range(longest) for pairs in lists if place < len(pairs)]


def _warn_of_unknown(pairs: Sequence[tuple[str, str]]) -> None:
    if pairs:
        first, second = pairs[0]
        logger.warning(
            "concept: the pipeline answers %r as it answers %r, so it does not know the concept, or as the same; ask it for pictures of both",
            first,
            second,
        )


def _tell(before: float, after: float) -> None:
    logger.info("remaining effect of the concept's wordings, times guidance: %.3g before, %.3g after", before, after)
    if after > LASTING:
        logger.warning(
            "the concept's wordings still have %.2g times the effect that they had without guidance (%.3g before), so it is probably still "
            "drawn; lower ridge or keep_weight, raise strength, or keep fewer prompts that are like it",
            after,
            before,
        )
