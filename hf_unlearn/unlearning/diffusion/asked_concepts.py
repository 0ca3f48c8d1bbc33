"""What a user asks [`redirect_concept`] for, made sense of: concepts and anchors, wordings, and what is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...training.checks import shown
from .anchor_words import MANY, AnchorWords
from .text_moments import last_words
from .text_side import TextSide, tell_of_length
from .wordings import exchanged, filled, kind_of, naming, templates_for


logger = logging.getLogger(__name__)


def anchors_for(
    side: TextSide, concept: Any, anchor: Any, batch_size: int, *, may_be_empty: bool = False
) -> dict[str, str]:
    """`{concept: anchor}`, of which those that are not given are chosen by [`AnchorWords`] and told by the logger.

    Args:
        concept (`str` | `Sequence[str]` | `Mapping[str, str]`): as the user gave it.
        anchor (`str` | `Sequence[str]` | `Mapping[str, str]`, *optional*): as the user gave it.
        may_be_empty (`bool`, defaults to `False`): an anchor may be the empty text, which also stands beside a dict without being asked for.

    Raises:
        ValueError: one is missing, empty or given twice, or an anchor names a concept.
    """
    if isinstance(concept, Mapping):
        if anchor is not None and not (may_be_empty and anchor == ""):
            raise ValueError("anchor: given beside a dict of concepts and anchors; keep one of them")
        anchor = concept
    concepts = _texts("concept", [concept] if isinstance(concept, str) else concept)
    if not concepts:
        raise ValueError("concept: there is none; name a word or a phrase")
    folded = [name.casefold() for name in concepts]
    if twice := [name for name in folded if folded.count(name) > 1]:
        raise ValueError(f"concept: {twice[0]!r} is given twice; leave one out")
    anchors = _given_anchors(concepts, anchor, may_be_empty)
    _check_anchors(concepts, anchors)
    words = AnchorWords(side, concepts, batch_size)
    without = [name for name in concepts if name not in anchors]
    for name in without:
        anchors[name] = words.of(name, asks=len(without) <= MANY)
        logger.info("anchor: %r is redirected to %r", name, anchors[name])
    _check_anchors(concepts, anchors)
    return {name: anchors[name] for name in concepts}


def _given_anchors(concepts: Sequence[str], anchor: Any, may_be_empty: bool) -> dict[str, str]:
    """The anchors that were given, by concept."""
    if anchor is None:
        return {}
    if isinstance(anchor, str):
        (one,) = _texts("anchor", [anchor], may_be_empty=may_be_empty)
        return dict.fromkeys(concepts, one)
    if isinstance(anchor, Mapping):
        given = {name: other for name, other in anchor.items() if other is not None}
        others = _texts("anchor", given.values(), may_be_empty=may_be_empty)
        given = dict(zip(_texts("anchor", given), others, strict=True))
        if strange := [name for name in given if name not in concepts]:
            raise ValueError(f"anchor: {shown(strange[0])} is no concept; use the concepts as keys")
        return given
    given = _texts("anchor", anchor, may_be_empty=may_be_empty)
    if len(given) != len(concepts):
        raise ValueError(f"anchor: {len(given)} for {len(concepts)} concepts; give one for all, or one for each")
    return dict(zip(concepts, given, strict=True))


def _check_anchors(concepts: Sequence[str], anchors: Mapping[str, str]) -> None:
    named = naming(concepts)
    for name, other in anchors.items():
        if found := named.search(other):
            same = other.casefold() == name.casefold()
            why = "is the concept itself" if same else f"names {found[1]!r}, which is to be forgotten"
            raise ValueError(f"anchor={other!r}: {why}; choose another")


def wordings_for(
    side: TextSide, anchors: Mapping[str, str], wordings: Sequence[str] | None
) -> dict[str, list[tuple[str, str]]]:
    """For each concept its wordings, each beside the same with every concept exchanged for its anchor.

    Raises:
        ValueError: a wording has neither a `{}` nor a concept, or a concept has no wording that the encoder reads.
    """
    if wordings is not None:
        if isinstance(wordings, str):
            raise ValueError(f"wordings={shown(wordings)}: is one text; pass a list")
        wordings = _texts("wordings", wordings)
        named = naming(list(anchors))
        if odd := [text for text in wordings if "{}" not in text and not named.search(text)]:
            raise ValueError(f"wordings: {shown(odd[0])} has no {{}} and names no concept; it belongs to keep")
    found = {}
    for name in anchors:
        own, named = wordings, naming([name])
        if own is None:
            own = templates_for(name, kind_of(name))
        prompts = [filled(text, name) for text in own if "{}" in text or named.search(text)]
        if not prompts:
            raise ValueError(f"wordings: none asks for {name!r}; add one, or a template with {{}}")
        found[name] = [(prompt, exchanged(prompt, anchors)) for prompt in dict.fromkeys(prompts)]
    if wordings is not None:
        tell_of_length("wordings", side, wordings)
        found = {name: _read(side, name, pairs) for name, pairs in found.items()}
    return found


def by_last_words(
    side: TextSide, concept: Any, anchor: Any, wordings: Sequence[str], batch_size: int
) -> tuple[dict[str, str], list[tuple[str, str]], dict[str, Tensor], dict[str, Tensor]]:
    """Anchors, which may be empty, pairs of wordings, and of both sides the states of the last words by stream, `[rows, width]`.

    Raises:
        ValueError: as of [`anchors_for`] and [`wordings_for`], or concept and anchor are the same to the text encoder.
    """
    anchors = anchors_for(side, concept, anchor, batch_size, may_be_empty=True)
    found = wordings_for(side, anchors, wordings)
    parts = {
        name: [last_words(side, prompts, batch_size) for prompts in zip(*found[name], strict=True)] for name in found
    }
    for name, (asked, instead) in parts.items():
        if all(torch.equal(asked[stream], instead[stream]) for stream in asked):
            raise ValueError(no_difference(name, anchors[name]))
    asked, instead = (
        {
            stream: torch.cat([both[which][stream] for both in parts.values()])
            for stream in next(iter(parts.values()))[which]
        }
        for which in (0, 1)
    )
    return anchors, [pair for pairs in found.values() for pair in pairs], asked, instead


def no_difference(concept: str, anchor: str) -> str:
    """What to say of a concept that its anchor cannot be told from."""
    return f"concept={concept!r}: the text encoder knows no difference to {anchor!r}; choose another anchor="


def kept_without(side: TextSide, keep: Sequence[str], concepts: Sequence[str]) -> list[str]:
    """Prompts to keep, without those that name a concept, which is said."""
    if isinstance(keep, str):
        raise ValueError(f"keep={shown(keep)}: is one text; pass a list")
    prompts = _texts("keep", keep, may_be_empty=True)
    named = naming(list(concepts))
    kept = [prompt for prompt in prompts if not named.search(prompt)]
    if len(kept) < len(prompts):
        first = next(prompt for prompt in prompts if named.search(prompt))
        logger.warning(
            "keep: %d of %d prompts name what is to be forgotten (%s), and are left out",
            len(prompts) - len(kept),
            len(prompts),
            shown(first),
        )
    tell_of_length("keep", side, kept)
    return kept


def _read(side: TextSide, concept: str, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those wordings whose concept the encoder still reads."""
    asked, instead = (side.ids(prompts) for prompts in zip(*pairs, strict=True))
    differs = [any(a[row] != b[row] for a, b in zip(asked, instead, strict=True)) for row in range(len(pairs))]
    if not any(differs):
        raise ValueError(
            f"wordings: the encoder reads none as far as {concept!r}, or as the same as the anchor; shorten them"
        )
    return [pair for pair, does in zip(pairs, differs, strict=True) if does]


def _texts(argument: str, texts: Iterable[Any], *, may_be_empty: bool = False) -> list[str]:
    """Texts without white space around them; anything else is refused."""
    found = list(texts)
    for text in found:
        if not isinstance(text, str) or not (may_be_empty or text.strip()):
            raise ValueError(f"{argument}: {shown(text)} is no text; give words")
    return [text.strip() for text in found]
