"""Which word a concept is redirected to, where none is given."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from .text_side import TextSide
from .wordings import GENERIC, KINDS, filled, kind_of, naming


TEMPLATE = "a photo of a {}"
NEAREST = 5  # words of the kind, of which the one is taken that is the least confused with others
SAME = 0.5  # of the usual distance between neighbours of a kind: what is nearer is another word for the same thing


class AnchorWords:
    """Finds for a concept another word of its kind: one that the text encoder puts near, so that little else of a prompt changes, and that
    it keeps apart from other words.

    Args:
        side (`TextSide`): of the pipeline.
        concepts (`Sequence[str]`): all that is to be forgotten; none of it is an anchor.
        batch_size (`int`): prompts encoded at once.
    """

    def __init__(self, side: TextSide, concepts: Sequence[str], batch_size: int = 16):
        self.side, self.concepts, self.batch_size = side, list(concepts), batch_size
        self._known: dict[str, Tensor] = {}

    def of(self, concept: str) -> str:
        """The anchor of a concept: of the words of its kind that are not the same thing, the nearest few, and of these the one whose own
        nearest neighbour is the furthest away; a generic word where nothing of the kind is known.
        """
        kind = kind_of(concept) or self._nearest_kind(concept)
        forbidden = naming(self.concepts)
        words = [word for word in KINDS.get(kind, ()) if not forbidden.search(word) and not _within(word, concept)]
        if len(words) < 2:
            return GENERIC
        states = self.states(words)
        away = (states - self.states([concept])).norm(dim=1)
        apart = torch.cdist(states, states).fill_diagonal_(torch.inf).amin(1)
        away[away < SAME * apart.median()] = torch.inf
        nearest = away.argsort()[:NEAREST]
        nearest = nearest[away[nearest].isfinite()]
        return words[nearest[apart[nearest].argmax()]] if len(nearest) else GENERIC

    def _nearest_kind(self, concept: str) -> str | None:
        """The kind of the nearest listed word; None where half of all words are as near to the one that is nearest to them."""
        states, kinds = self._listed
        away = (states - self.states([concept])).norm(dim=1)
        usual = torch.cdist(states, states).median()
        nearest = away.argmin().item()
        return kinds[nearest] if away[nearest] < usual else None

    @cached_property
    def _listed(self) -> tuple[Tensor, list[str]]:
        known = [(word, kind) for kind, words in KINDS.items() for word in words]
        return self.states([word for word, _ in known]), [kind for _, kind in known]

    @torch.no_grad()
    def states(self, words: Sequence[str]) -> Tensor:
        """Mean state over the tokens of a prompt with each word, `[words, width]`, float64, on the CPU."""
        new = [word for word in dict.fromkeys(words) if word not in self._known]
        for begin in range(0, len(new), self.batch_size):
            some = new[begin : begin + self.batch_size]
            prompts = [filled(TEMPLATE, word) for word in some]
            tokens = self.side.told(prompts).tokens
            for word, states, ids in zip(some, tokens, self.side.ids(prompts)[0], strict=True):
                self._known[word] = states[: len(ids)].double().mean(0).cpu()
        return torch.stack([self._known[word] for word in words])


def _within(word: str, concept: str) -> bool:
    """Whether a word says the concept, or a part of it."""
    return bool(naming([word]).search(concept))
