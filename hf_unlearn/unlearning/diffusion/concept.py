"""What a run on prompts is to forget, settled before anything is drawn: which word, what is asked instead, and what is kept."""

from __future__ import annotations

import copy
import logging
import random
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from ...training.checks import shown
from .asked_concepts import anchors_for, wordings_for
from .encoded import prompts_of
from .pipelines import architecture_of, text_side_of
from .text_side import TextSide
from .wordings import exchanged, kept_prompts, neighbours


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


logger = logging.getLogger(__name__)

BATCH = 16  # prompts encoded at once
# What a prompt says of any picture: a concept neither begins nor ends with it.
AROUND = {
    *["a", "an", "the", "of", "in", "on", "at", "by", "with", "and", "or", "to", "from", "for", "over", "behind", "is", "its", "it", "this", "that", "some", "one", "s", "style"],
    *["photo", "photograph", "picture", "image", "painting", "drawing", "sketch", "portrait", "illustration", "render", "rendering", "artwork", "close-up", "closeup"],
    *["background", "plain", "small", "big", "high", "quality", "detailed"],
}  # fmt: skip


def common_phrase(prompts: Sequence[str]) -> str | None:
    """The longest run of words that all prompts have, without words that are said of any picture around it; None where there is none.

    Args:
        prompts (`Sequence[str]`): as they were given; compared without regard to capitals and marks.
    """
    words = [re.findall(r"\w+(?:-\w+)*", prompt) for prompt in prompts]
    if not words:
        return None
    first = min(words, key=len)
    runs = [first[begin:end] for begin in range(len(first)) for end in range(len(first), begin, -1)]
    stripped = {tuple(_stripped(run)) for run in runs} - {()}
    others = [f" {' '.join(line).casefold()} " for line in words]
    shared = [run for run in stripped if all(f" {' '.join(run).casefold()} " in line for line in others)]
    # Of runs of one length the one that is said first.
    return " ".join(max(shared, key=lambda run: (len(run), -_place(run, first)))) if shared else None


def _stripped(words: Sequence[str]) -> list[str]:
    words = list(words)
    while words and words[0].casefold() in AROUND:
        words.pop(0)
    while words and words[-1].casefold() in AROUND:
        words.pop()
    return words


def _place(run: Sequence[str], words: Sequence[str]) -> int:
    return next(place for place in range(len(words)) if list(words[place : place + len(run)]) == list(run))


def settled(args: Any, pipeline: DiffusionPipeline, dataset: Any) -> Any:
    """A copy of a config in which everything stands that follows from the concept, the prompts and the pipeline.

    Args:
        args (`VDUConfig`): as the user gave it.
        pipeline (`DiffusionPipeline`): a prompted one.
        dataset: the images to forget, if there are any.

    Raises:
        ValueError: there is no concept where one is needed, or prompts that do not name it.
    """
    architecture = architecture_of(pipeline)
    prompts = args.forget_prompts or prompts_of(dataset, architecture.columns)
    concept, reads_words = args.concept, isinstance(architecture, TextSide)
    if not reads_words and (concept is not None or args.closed_form):
        name = "closed_form" if concept is None else "concept"
        raise ValueError(
            f"{name}: {type(pipeline).__name__} is told a class, and no words; leave it out, and name the classes in forget_prompts"
        )
    if concept is None and args.redirect_prompt is None and prompts and reads_words:
        concept = common_phrase(prompts)
        if concept is not None:
            logger.info("concept: %r, which all prompts to forget name; set concept= where it is another", concept)
    made = copy.copy(args)
    if concept is None:
        if args.closed_form:
            raise ValueError(
                "closed_form: needs a concept; set concept= to the word or phrase that is to be forgotten"
            )
        if args.redirect_prompt is None and reads_words:
            logger.warning(
                "concept: the prompts to forget have no words in common, so all that they ask for is redirected to the empty prompt; set "
                "concept= to what is to be forgotten"
            )
        made.redirect_prompt = "" if args.redirect_prompt is None else args.redirect_prompt
        made.closed_form = False
        return made
    side = text_side_of(pipeline)
    made.concept = anchors = anchors_for(side, concept, None, BATCH)
    if not prompts:
        prompts = [asked for pairs in wordings_for(side, anchors, None).values() for asked, _ in pairs]
        if dataset is None:
            made.forget_prompts = prompts
    if args.redirect_prompt is None:
        made.redirect_prompt = {prompt: exchanged(prompt, anchors) for prompt in dict.fromkeys(prompts)}
        if same := [prompt for prompt, other in made.redirect_prompt.items() if prompt == other]:
            where = "forget_prompts" if args.forget_prompts else "forget_dataset"
            raise ValueError(
                f"{where}: {shown(same[0])} does not name {' or '.join(map(repr, anchors))}; add what it calls it to concept=, or take it out"
            )
        asked, other = next(iter(made.redirect_prompt.items()))
        logger.info("redirect_prompt: %r is to be answered as %r, and so on", asked, other)
    if args.replay_prompts is None:
        made.replay_prompts = _kept(made.redirected(prompts), anchors)
        logger.info(
            "replay_prompts: %d of our own, a third of them with %s, a third with other words of the kind, the rest of other things; give "
            "yours, for what must stay",
            len(made.replay_prompts),
            " and ".join(map(repr, dict.fromkeys(anchors.values()))),
        )
    return made


def _kept(instead: Sequence[str], anchors: Mapping[str, str]) -> list[str]:
    """What is asked instead, the neighbours of what is forgotten and prompts of all kinds in turn."""
    kept, near = kept_prompts(anchors), neighbours(anchors)
    for prompts in (kept, near):
        random.Random(0).shuffle(prompts)  # of all kinds from the first on
    often = [list(dict.fromkeys(instead)), *([near] if near else [])]
    turns = [[prompts[i % len(prompts)] for i in range(len(kept))] for prompts in often]
    return list(chain.from_iterable(zip(*turns, kept, strict=True)))
