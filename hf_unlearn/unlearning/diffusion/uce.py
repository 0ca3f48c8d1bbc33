"""UCE: a concept's last token read as another's, in closed form (arXiv 2308.14761, WACV 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...training.checks import check_number
from .asked_concepts import by_last_words, kept_without
from .closed_form import regression
from .pipelines import text_side_of
from .redirect import ConceptRedirection
from .text_moments import last_words


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def uce(
    pipe: DiffusionPipeline,
    concept: str | Sequence[str] | Mapping[str, str],
    *,
    anchor: str | Sequence[str] | Mapping[str, str] | None = "",
    wordings: Sequence[str] = ("{}",),
    keep: Sequence[str] = (),
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
    lamb: float = 0.5,
    batch_size: int = 16,
) -> DiffusionPipeline:
    r"""Change a text-to-image pipeline in place by Unified Concept Editing: each layer that reads text is to answer the state c of a concept's last
    token as it answered the anchor's c*, and the last token of what is kept as before.

    $$ W' = \Big(\lambda W + e \sum W c^* c^\top + p \sum W k k^\top\Big)\Big(\lambda I + e \sum c c^\top + p \sum k k^\top\Big)^{-1} $$

    ```python
    pipe = uce(pipe, "Van Gogh", anchor="art", keep=["Monet", "Rembrandt"])
    ```

    Args:
        pipe, concept: as of [`redirect_concept`].
        anchor (`str` | `Sequence[str]` | `Mapping[str, str]`, *optional*, defaults to `""`): what is drawn instead, as of [`redirect_concept`];
            the empty text where nothing is. None chooses one.
        wordings (`Sequence[str]`, defaults to the concept alone): ways to ask for it, as of [`redirect_concept`].
        keep (`Sequence[str]`, defaults to none): prompts whose last token is kept.
        erase_scale, preserve_scale (`float`, default to 1.0): e and p.
        lamb (`float`, defaults to 0.5): λ.
        batch_size (`int`, defaults to 16): prompts encoded at once.

    Returns:
        `DiffusionPipeline`: `pipe`.

    Raises:
        ValueError: as of [`redirect_concept`]. Nothing was changed.
    """
    for name, value, rule in (
        ("erase_scale", erase_scale, "> 0"), ("preserve_scale", preserve_scale, "≥ 0"), ("lamb", lamb, "> 0"),
    ):  # fmt: skip
        check_number(name, value, rule)
    side = text_side_of(pipe)
    anchors, pairs, asked, instead = by_last_words(side, concept, anchor, wordings, batch_size)
    kept = last_words(side, kept_without(side, keep, list(anchors)), batch_size)
    changes, second = {}, {}
    for stream, states in asked.items():
        others = kept.get(stream, states[:0])
        here, known = erase_scale * states.T @ states, preserve_scale * others.T @ others
        changes[stream] = regression(
            erase_scale * (instead[stream] - states).T @ states, here, known, here.new_tensor(lamb)
        )
        second[stream] = here + known
    ConceptRedirection(anchors, pairs, changes, second).apply(pipe)
    pipe.maybe_free_model_hooks()  # what is offloaded goes back
    return pipe
