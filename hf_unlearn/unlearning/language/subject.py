"""Whom a text is about, and the same text about somebody whom the model never met.

A *word* is a run of tokens without a space or a mark in between. The *subject* of a text are those words of its prompt that the forget texts
use far more often than other texts do. In the counterfactual text every one of them is another word, the same one wherever it stands, made
of pieces of the vocabulary that look alike: a name where a name was, figures where figures were.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any


TIMES = 4.0  # a subject's words are this much more frequent in the forget prompts than elsewhere
LONGEST = 6  # pieces of a word that is made up


@dataclass(frozen=True)
class Word:
    """A word of a row, as it is written, and its tokens `begin … end − 1`."""

    surface: str
    begin: int
    end: int

    @property
    def text(self) -> str:
        """In small letters: what words are compared by."""
        return self.surface.casefold()

    @property
    def capital(self) -> bool:
        return self.surface[:1].isupper()


class Words:
    """Splits rows of token ids into words, and makes up new ones.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        special = set(tokenizer.all_special_ids)
        size = len(tokenizer)
        pieces = tokenizer.convert_ids_to_tokens(list(range(size)))
        self.spaced = [bool(piece) and piece[0] in "Ġ▁ " for piece in pieces]
        self.pieces = [
            "" if index in special or piece is None else tokenizer.convert_tokens_to_string([piece]).strip()
            for index, piece in enumerate(pieces)
        ]

    def of(self, ids: Sequence[int]) -> list[Word]:
        """The words of a row, in order."""
        found: list[Word] = []
        begin = None
        for place, index in enumerate([*ids, -1]):
            piece = self.pieces[index] if 0 <= index < len(self.pieces) else ""
            starts = bool(piece) and _is_letter(piece[0])
            goes_on = (
                begin is not None and starts and not self.spaced[index] and _is_letter(self.pieces[ids[place - 1]][-1])
            )
            if goes_on:
                continue
            if begin is not None:
                found.append(self._word(ids, begin, place))
            begin = place if starts else None
        return found

    def _word(self, ids: Sequence[int], begin: int, end: int) -> Word:
        text = "".join(self.pieces[index] for index in ids[begin:end])
        text = text.rstrip("".join({c for c in text if not _is_letter(c)}))
        return Word(text, begin, end)

    @cached_property
    def _pools(self) -> dict[tuple[bool, str], list[str]]:
        """Pieces to make words of: by whether they begin one, and by what they are made of."""
        pools: dict[tuple[bool, str], list[str]] = {}
        for piece, spaced in zip(self.pieces, self.spaced, strict=True):
            if (kind := _kind(piece)) and (len(piece) > 1 or kind == "digit"):
                pools.setdefault((spaced, kind), []).append(piece)
        return pools

    def made_up(self, word: str, known: Container[str], key: Any) -> str:
        """Another word: of pieces of the same kind, as many as it has.

        Args:
            word: as it is written.
            known: words in small letters that it must not be.
            key: what the choice is a function of.
        """
        rng = random.Random(f"{key} {word}")
        pieces = self._split(word)
        for _ in range(100):
            new = "".join(self._like(piece, place == 0, rng) for place, piece in enumerate(pieces))
            if new.casefold() not in known:
                break
        return new

    def _split(self, word: str) -> list[str]:
        ids = self.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        pieces = [piece for index in ids if (piece := self.pieces[index])][:LONGEST] or [word]
        # Of one piece alone there are few words, and the model has met them all.
        return pieces if len(pieces) > 1 or word.isdecimal() else [*pieces, "er"]

    def _like(self, piece: str, begins: bool, rng: random.Random) -> str:
        kind = _kind(piece) or "lower"
        pool = self._pools.get((begins, kind)) or self._pools.get((not begins, kind)) or [piece]
        new = rng.choice(pool)
        return new[: len(piece)] if kind == "digit" else new


def _is_letter(character: str) -> bool:
    return character.isalnum() or character == "�"  # a part of a letter of several bytes


def _kind(piece: str) -> str:
    if piece.isdecimal():
        return "digit"
    if not piece.isalpha():
        return ""
    return (
        "capital"
        if piece[0].isupper() and (len(piece) == 1 or piece[1:].islower())
        else "lower"
        if piece.islower()
        else ""
    )


def over_used(mine: Sequence[Sequence[Word]], theirs: Sequence[Sequence[Word]], *, times: float = TIMES) -> set[str]:
    """Words that are in a share of some texts `times` as large as of others.

    Args:
        mine, theirs: words of each text.
        times (`float`): ratio of the shares; what none of the others has counts as half a text there.
    """
    here, there = (Counter(text for row in rows for text in {word.text for word in row}) for rows in (mine, theirs))
    return {
        text for text, count in here.items() if count * (len(theirs) + 1) >= times * len(mine) * (there[text] + 0.5)
    }


def _names(rows: Iterable[Sequence[Word]]) -> set[str]:
    """Words that are mostly written with a capital letter, and not since a text begins with them."""
    seen, capital = Counter(), Counter()
    for row in rows:
        for place, word in enumerate(row):
            seen[word.text] += 1
            capital[word.text] += word.capital and place > 0
    return {text for text, count in seen.items() if 2 * capital[text] >= count}


def _whole_name(row: Sequence[Word], subject: set[str], names: set[str]) -> tuple[str, ...]:
    """The subject's words, and the words of a name that stand beside them: a stranger with somebody's first name reminds the model of them."""
    part = [word.text in subject for word in row]
    for order in (range(1, len(row)), range(len(row) - 2, -1, -1)):
        for place in order:
            before = place - order.step
            beside = row[min(place, before)].end == row[max(place, before)].begin
            part[place] |= part[before] and beside and row[place].capital and row[place].text in names
    return tuple(dict.fromkeys(word.text for word, is_part in zip(row, part, strict=True) if is_part))


@dataclass(frozen=True)
class Counterfactual:
    """A row about somebody else.

    Attributes:
        ids (`list[int]`): its tokens.
        places (`list[int]`): for each token of the row that it was made of, where it stands in `ids`; −1 where it was replaced.
    """

    ids: list[int]
    places: list[int]


class Subjects:
    """Whom each forget text is about, and who takes their place.

    Args:
        words ([`Words`]): of the model's tokenizer.
        prompts: token ids of each forget prompt; of a text without one, all of it.
        others: token ids of texts that are to be kept.
        marked (*optional*): for each prompt the text that names its subject, or None: it is looked for.

    Attributes:
        of (`list[tuple[str, ...]]`): words of each prompt's subject, in order; none where none was found.
        strangers (`dict[tuple[str, ...], dict[str, str]]`): who takes a subject's place, word by word.
    """

    def __init__(
        self,
        words: Words,
        prompts: Sequence[Sequence[int]],
        others: Sequence[Sequence[int]],
        marked: Sequence[str | None] | None = None,
    ):
        self.words = words
        rows, background = [words.of(ids) for ids in prompts], [words.of(ids) for ids in others]
        over, names = over_used(rows, background), _names(rows)
        self.of: list[tuple[str, ...]] = []
        self.surface: dict[str, str] = {}
        for row, mark in zip(rows, marked or [None] * len(rows), strict=True):
            if mark is not None:
                wanted = {word.text for word in words.of(words.tokenizer(mark, add_special_tokens=False)["input_ids"])}
            else:
                wanted = {word.text for word in row} & over
                wanted = wanted & names or wanted
            self.of.append(_whole_name(row, wanted, names))
            self.surface = {word.text: word.surface for word in row if word.text in self.of[-1]} | self.surface
        self._known = {word.text for row in (*rows, *background) for word in row}
        self.strangers = self.drawn(0)

    def drawn(self, seed: int) -> dict[tuple[str, ...], dict[str, str]]:
        """A stranger for every subject."""
        return {
            subject: {word: self.words.made_up(self.surface[word], self._known, (seed, subject)) for word in subject}
            for subject in dict.fromkeys(self.of)
            if subject
        }

    def replaced(self, ids: Sequence[int], new: Mapping[str, str]) -> Counterfactual:
        """The row with every word that `new` has another one for replaced, wherever it stands."""
        tokenizer, spaced = self.words.tokenizer, self.words.spaced
        found: list[int] = []
        places: list[int] = []
        done = 0
        for word in self.words.of(ids):
            if word.text not in new:
                continue
            places += range(len(found), len(found) + word.begin - done)
            found += ids[done : word.begin]
            text = new[word.text] if word.capital else new[word.text].lower()
            found += tokenizer(f" {text}" if spaced[ids[word.begin]] else text, add_special_tokens=False)["input_ids"]
            places += [-1] * (word.end - word.begin)
            done = word.end
        places += range(len(found), len(found) + len(ids) - done)
        return Counterfactual([*found, *ids[done:]], places)

    def named_in(self, ids: Sequence[int]) -> list[tuple[str, ...]]:
        """The subjects that a text is about: all words of theirs are in it."""
        here = {word.text for word in self.words.of(ids)}
        return [subject for subject in dict.fromkeys(self.of) if subject and here.issuperset(subject)]
