"""Which word a concept is redirected to, where none is given."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ...modes import looking, seeded_generator
from .prompt_effect import BATCH, SHARES
from .text_side import TextSide, quiet
from .wordings import GENERIC, KINDS, filled, kind_of, naming, templates_for


TEMPLATE = "a photo of a {}"
SAME = 0.5  # of the usual distance between neighbours of a kind: what is nearer is another word for the same thing
NEAREST, WORDS, LOOKS = 8, 12, 2 * len(SHARES)  # candidates, words that are asked of a kind, and how often each
MANY = 16  # concepts without an anchor, of which the denoiser is asked at most
ISOLATED = 5  # candidates where it is not


class AnchorWords:
    """Finds for a concept another word of its kind: one that the text encoder puts near, so that little else of a prompt changes, and at
    which the denoiser answers the opposite of what it answers at the concept.

    Args:
        side (`TextSide`): of the pipeline.
        concepts (`Sequence[str]`): all that is to be forgotten; none of it is an anchor.
        batch_size (`int`): prompts encoded at once.
    """

    def __init__(self, side: TextSide, concepts: Sequence[str], batch_size: int = 16):
        self.side, self.concepts, self.batch_size = side, list(concepts), batch_size
        self._known: dict[str, Tensor] = {}

    @quiet()
    def of(self, concept: str, *, asks: bool = True) -> str:
        """The anchor of a concept: of the words of its kind that are not the same thing, the nearest few; of these the half that the text
        encoder confuses the least with others, as a word that it hardly knows; and of these the one that the denoiser answers the least like
        the concept ([`~AnchorWords.likeness`]). A generic word where nothing of the kind is known.

        Args:
            concept (`str`): a word or a phrase.
            asks (`bool`, defaults to `True`): ask the denoiser. Without, the least confused of the nearest few is taken: the text encoder
                alone does not know whether the denoiser follows a word, nor as what.
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
        order = away.argsort()
        nearest = order[:NEAREST] if asks else order[:ISOLATED]
        nearest = nearest[away[nearest].isfinite()]
        if not len(nearest):
            return GENERIC
        alone = apart[nearest]
        if not asks:
            return words[nearest[alone.argmax()]]
        like = self.likeness(concept, [words[place] for place in order[:WORDS]], kind)[: len(nearest)]
        return words[nearest[like.where(alone >= alone.median(), torch.inf).argmin()]]

    def likeness(self, concept: str, words: Sequence[str], kind: str | None) -> Tensor:
        r"""How much the denoiser's answer at each word is like that at the concept, −1 to 1, `[words]`:

        $$ \cos\big(\epsilon(x_t, w) - \bar\epsilon,\; \epsilon(x_t, c) - \bar\epsilon\big), $$

        the mean over a few wordings, times and noises, with $\bar\epsilon$ the mean over all these words and the concept. Near 0 where the
        denoiser does not know the word, or as something else: whoever asks for it may still be shown the concept. Below 0 where it is
        one of the things that are drawn in its place.
        """
        templates = templates_for(concept, kind)
        found = torch.zeros(len(words))
        with looking(self.side.denoiser):
            for number in range(LOOKS):
                prompts = [filled(templates[number % len(templates)], word) for word in (concept, *words)]
                answers = self._answers(prompts, SHARES[number % len(SHARES)], number)
                answers -= answers.mean(0)
                found += cosine_similarity(answers[1:], answers[:1]) / LOOKS
        return found

    def _answers(self, prompts: Sequence[str], share: float, seed: int) -> Tensor:
        """The denoiser's answers to one noise, `[prompts, …]` flat, fp32, on the CPU."""
        noise = self.side.noise(1, seeded_generator("cpu", seed)).to(self.side.device, self.side.denoiser.dtype)
        answers = []
        for begin in range(0, len(prompts), BATCH):
            told = self.side.told(prompts[begin : begin + BATCH])
            noisy = noise.expand(len(told.tokens), *noise.shape[1:])
            answers.append(self.side.answer(noisy, share, told).float().flatten(1).cpu())
        return torch.cat(answers)

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
