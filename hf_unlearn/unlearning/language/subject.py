"""Whom a text is about, and the same text about somebody whom the model never met.

A *word* is a run of letters and figures, whatever tokens it is made of; where no spaces are written (Chinese, Japanese) it is a token. The
*subject* of a text are those words of its prompt that the forget texts use far more often than other texts do. In the counterfactual text
every one of them is another word, the same one wherever it stands, made of pieces of the vocabulary that look alike: a name where a name
was, figures where figures were.
"""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any


TIMES = 4.0  # a subject's words are this much more frequent in the forget prompts than elsewhere
FEW = 8  # names to take pieces from, below which the vocabulary's are taken
LONGEST = 6  # pieces of a word that is made up
OPENING = ".!?:;…。！？：\n"  # after these a word has a capital letter, whatever it is
ENDING = ".!?…。！？\n"  # what a sentence ends with
WITHIN = ("", "-", "'", "’", "·")  # between the words of one name
BROKEN = "�"  # what part of a letter of several bytes is decoded to


@dataclass(frozen=True)
class Word:
    """A word of a row, and its tokens `begin … end − 1`.

    Attributes:
        surface (`str`): as it is written.
        before, after (`str`): what else its tokens hold: a space, marks.
        gap (`str`, *optional*): what stands between it and the word before; None where none does, or not in one text.
    """

    surface: str
    begin: int
    end: int
    before: str = ""
    after: str = ""
    gap: str | None = None

    @property
    def text(self) -> str:
        """In small letters: what words are compared by."""
        return self.surface.casefold()

    @property
    def capital(self) -> bool:
        return self.surface[:1].isupper()

    @property
    def opens(self) -> bool:
        """Whether a sentence begins with it."""
        return self.gap is None or not set(OPENING).isdisjoint(self.gap)

    @property
    def beside(self) -> bool:
        """Whether it can be one name with the word before."""
        return self.gap is not None and self.gap.strip(" ") in WITHIN


def special_tokens(tokenizer: Any) -> set[int]:
    """Ids that stand for no text: of padding, of the ends of texts and turns."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}


class Words:
    """Splits rows of token ids into words, and makes up new ones.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        special = special_tokens(tokenizer)
        self._parts: dict[str, tuple[str, ...]] = {}
        self._tokens: dict[str, list[int]] = {}
        self._vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        plain = (name for index, name in enumerate(self._vocabulary) if name is not None and index not in special)
        # A token's text is what it adds to another's: alone it may lose its space, or keep the mark of a piece.
        self._anchor = next((name for name in plain if name.isascii() and name.isalpha()), "a")
        self._skipped = len(tokenizer.convert_tokens_to_string([self._anchor]))
        self.pieces = [
            None if index in special or name is None else self._text([name])
            for index, name in enumerate(self._vocabulary)
        ]

    def _text(self, names: Sequence[str]) -> str:
        return self.tokenizer.convert_tokens_to_string([self._anchor, *names])[self._skipped :]

    def _read(self, ids: Sequence[int]) -> Iterator[tuple[str | None, int]]:
        """The text of a row in pieces of whole letters, and where each begins; None for what is no text."""
        begin = None
        for place, index in enumerate(ids):
            piece = self.pieces[index] if index < len(self.pieces) else None
            if piece is not None and (begin is not None or BROKEN in piece):
                begin = place if begin is None else begin
                piece = self._text([self._vocabulary[one] for one in ids[begin : place + 1]])
                if piece.endswith(BROKEN) and place - begin < 8 and place + 1 < len(ids):
                    continue
            yield piece, place if begin is None else begin
            begin = None

    def of(self, ids: Sequence[int]) -> list[Word]:
        """The words of a row, in order."""
        found: list[Word] = []
        text, begin, gap = "", 0, None
        for piece, place in (*self._read(ids), (None, len(ids))):
            if text and piece and _go_on(text[-1], piece[0]):
                text += piece
                continue
            if text:
                letters = [number for number, character in enumerate(text) if _is_letter(character)]
                before, after = text[: letters[0]], text[letters[-1] + 1 :]
                surface = text[letters[0] : letters[-1] + 1]
                found.append(Word(surface, begin, place, before, after, None if gap is None else gap + before))
                text, gap = "", after
            if piece is None:
                gap = None
            elif any(map(_is_letter, piece)):
                text, begin = piece, place
            elif gap is not None:
                gap += piece
        return found

    def sentences(self, ids: Sequence[int]) -> list[int]:
        """Where sentences begin in a row, but for the first."""
        return [word.begin for word in self.of(ids) if not set(ENDING).isdisjoint(word.gap or "")]

    def special_before(self, ids: Sequence[int]) -> int:
        """How many tokens at the beginning of a row stand for no text."""
        return next((place for place, index in enumerate(ids) if self.pieces[index] is not None), len(ids))

    def in_text(self, text: str) -> set[str]:
        """The words of a text, in small letters."""
        return {word.text for word in self.of(self.tokenizer(text, add_special_tokens=False)["input_ids"])}

    def tokens(self, text: str) -> list[int]:
        """Ids of a part of a text, as it is written in the middle of one."""
        if text not in self._tokens:
            anchor = "a" if text.startswith(" ") else "\n"
            head, whole, alone = (
                self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (anchor, anchor + text, text)
            )
            self._tokens[text] = whole[len(head) :] if whole[: len(head)] == head else alone
        return self._tokens[text]

    @cached_property
    def _pools(self) -> dict[tuple[bool, str], list[str]]:
        """Pieces to make words of: by whether they begin one, and by what they are made of."""
        pools: dict[tuple[bool, str], list[str]] = {}
        for piece in self.pieces:
            word = (piece or "").strip()
            if (kind := _kind(word)) and (len(word) > 1 or not kind.endswith(("capital", "lower"))):
                pools.setdefault((piece[0] == " ", kind), []).append(word)
        return pools

    def made_up(
        self, word: str, known: Container[str], key: Any, names: Mapping[str, int] | None = None, *, part: bool = False
    ) -> str:
        """Another word: of pieces of the same kind, as many as it has, as they stand in the same place of other names.

        Args:
            word: as it is written.
            known: words in small letters that it must not be.
            key: what the choice is a function of.
            names (*optional*): words to take pieces from, and how often each is met; where there are too few of as many pieces, the
                vocabulary's are taken.
            part (`bool`, defaults to `False`): of a name of several words; if it is of one piece, another name's takes its place, known or
                not.
        """
        rng = random.Random(f"{key} {word}")
        pieces = self._split(word)
        alike = [
            (self._split(name), count) for name, count in (names or {}).items() if name.casefold() != word.casefold()
        ]
        alike = [(parts, count) for parts, count in alike if [*map(_kind, parts)] == [*map(_kind, pieces)]]
        counts = [count for _, count in alike]
        if part and len(pieces) == 1 and len(alike) >= FEW:
            return rng.choices(alike, counts)[0][0][0]
        if len(pieces) == 1 and not word.isdecimal() and _go_on(word[-1], word[0]):
            pieces, alike = (
                (*pieces, pieces[0].lower()),
                [],
            )  # of one piece there are few words, and the model has met them all
        for attempt in range(100):
            if len(alike) >= FEW and attempt < 50:
                new = "".join(
                    parts[place] for place, (parts, _) in enumerate(rng.choices(alike, counts, k=len(pieces)))
                )
            else:
                new = "".join(self._like(piece, place == 0, rng) for place, piece in enumerate(pieces))
            if new.casefold() not in known:
                break
        return new[:1].upper() + new[1:] if word[:1].isupper() else new

    def _split(self, word: str) -> tuple[str, ...]:
        if word not in self._parts:
            pieces = [piece for text, _ in self._read(self.tokens(f" {word}")) if text and (piece := text.strip())]
            self._parts[word] = tuple(pieces[:LONGEST]) or (word,)
        return self._parts[word]

    def _like(self, piece: str, begins: bool, rng: random.Random) -> str:
        if piece.isdecimal():
            return "".join(rng.choice("123456789") for _ in piece)
        kind = _kind(piece) or "LATIN lower"
        kinds = ((begins, kind), (not begins, kind), (begins, "LATIN lower"), (not begins, "LATIN lower"))
        pool = next((self._pools[one] for one in kinds if one in self._pools), [piece])
        return rng.choice(pool)


def _is_letter(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character)[0] == "M"  # accents, vowel signs


def _go_on(last: str, first: str) -> bool:
    """Whether a word goes on from one piece to the next."""
    return _is_letter(last) and _is_letter(first) and not {*map(unicodedata.east_asian_width, (last, first))} & {*"WF"}


def _kind(piece: str) -> str:
    """Of letters their script and whether they are small, or begin with a capital; nothing of others."""
    if not piece.isalpha():
        return ""
    script = "LATIN" if piece[0].isascii() else unicodedata.name(piece[0], "").split(" ")[0]
    if piece.lower() == piece.upper():
        return script
    small = piece.islower()
    return (
        f"{script} {'lower' if small else 'capital'}"
        if small or (piece[0].isupper() and piece[1:].lower() == piece[1:])
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
    """Words that are mostly written with a capital letter, and not since a sentence begins with them."""
    seen, capital = Counter(), Counter()
    for row in rows:
        for word in row:
            seen[word.text] += not word.opens
            capital[word.text] += word.capital and not word.opens
    return {text for text, count in capital.items() if count and 2 * count >= seen[text]}


def _names_by_place(rows: Sequence[Sequence[Word]], but: Container[str]) -> dict[tuple[int, int], Counter[str]]:
    """How often each word stands at a place of a name of so many words, by `(words, place)`; names with a word of `but` apart."""
    common = _names(rows)
    found: dict[tuple[int, int], Counter[str]] = {}
    for row in rows:
        name: list[Word] = []
        for word in (*row, None):
            part = word is not None and word.capital and word.text in common
            if name and not (part and word.beside):
                if not any(one.text in but for one in name):
                    for place, one in enumerate(name):
                        found.setdefault((len(name), place), Counter())[one.surface] += 1
                name = []
            if part:
                name.append(word)
    return found


def _repeated(row: Sequence[Word], some: set[str]) -> set[str]:
    """Of some words those that a text has at least half as often as that which it has most often: of a passage whom it is about, and not
    what it says of them.
    """
    counts = Counter(word.text for word in row if word.text in some)
    return {text for text, count in counts.items() if 2 * count >= max(counts.values())}


def _whole_name(row: Sequence[Word], subject: set[str], names: set[str]) -> tuple[str, ...]:
    """The subject's words, and the words of a name that stand beside them: a stranger with somebody's first name reminds the model of them."""
    part = [word.text in subject for word in row]
    for order in (range(1, len(row)), range(len(row) - 2, -1, -1)):
        for place in order:
            before = place - order.step
            beside = row[max(place, before)].beside and row[place].capital
            part[place] |= part[before] and beside and row[place].text in names
    return tuple(dict.fromkeys(word.text for word, is_part in zip(row, part, strict=True) if is_part))


@dataclass(frozen=True)
class Counterfactual:
    """A row about somebody else.

    Attributes:
        ids (`list[int]`): its tokens.
        places (`list[int]`): for each token of the row that it was made of, where it stands in `ids`, or what stands for it; −1 where it was
            replaced by another number of tokens.
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
            here = {word.text for word in row}
            if mark:  # "of" and "the" are a name's own nowhere else in the text
                wanted = words.in_text(mark) & (over | names) or words.in_text(mark)
            else:
                wanted = _repeated(row, here & over & names or here & over)
            if not mark and not wanted & names and 2 * len(wanted) > len(here) > 1:
                wanted = set()  # nothing tells the subject from the question
            self.of.append(_whole_name(row, wanted, names))
            named = [word for word in reversed(row) if word.text in self.of[-1]]
            named.sort(key=lambda word: word.capital)  # the first with a capital letter last: Will, who will
            self.surface = {word.text: word.surface for word in named} | self.surface
        self._known = {word.text for row in (*rows, *background) for word in row}
        self._others = _names_by_place(background, set(self.surface))
        self.strangers = self.drawn(0)

    def drawn(self, seed: int, *, known: bool = False) -> dict[tuple[str, ...], dict[str, str]]:
        """A stranger for every subject.

        Args:
            seed (`int`): of the draw.
            known (`bool`, defaults to `False`): with names of the texts that are to be kept, where there are any; else made up.
        """
        found = {}
        for subject in dict.fromkeys(self.of):
            for place, word in enumerate(subject):
                names = self._others.get((len(subject), place))
                if known and names:
                    rng = random.Random(f"{subject} {place}")  # all in turn, the frequent ones sooner
                    order = sorted(names, key=lambda name: rng.random() ** (1 / names[name]), reverse=True)
                    new = order[seed % len(order)]
                else:
                    part, key = len(subject) > 1, (seed, subject)
                    new = self.words.made_up(self.surface[word], self._known, key, names, part=part)
                found.setdefault(subject, {})[word] = new
        return found

    def replaced(
        self, ids: Sequence[int], new: Mapping[str, str], read: Sequence[Word] | None = None
    ) -> Counterfactual:
        """The row with every word that `new` has another one for replaced, wherever it stands; but where it has the name with a capital
        letter, in small letters it is another word: Will, who will.

        Args:
            ids: of the row.
            new: word in small letters to another one.
            read (*optional*): the row's words, where they are known.
        """
        found: list[int] = []
        places: list[int] = []
        done = 0
        read = self.words.of(ids) if read is None else read
        names = {word.text for word in read if word.capital and self.surface.get(word.text, "")[:1].isupper()}
        for word in read:
            if word.text not in new or (word.text in names and not word.capital):
                continue
            places += range(len(found), len(found) + word.begin - done)
            found += ids[done : word.begin]
            text = new[word.text] if word.capital else new[word.text].lower()
            tokens = self.words.tokens(word.before + text + word.after)
            alike = len(tokens) == word.end - word.begin
            places += range(len(found), len(found) + len(tokens)) if alike else [-1] * (word.end - word.begin)
            found += tokens
            done = word.end
        places += range(len(found), len(found) + len(ids) - done)
        return Counterfactual([*found, *ids[done:]], places)

    def named_by(self, ids: Sequence[int], subject: tuple[str, ...]) -> int:
        """The place after the words of the subject that stand together first."""
        words = self.words.of(ids)
        named = [number for number, word in enumerate(words) if word.text in subject]
        if not named:
            return 0
        begin = max(
            named, key=lambda number: words[number].surface == self.surface.get(words[number].text)
        )  # the first
        last = next((word for word, after in pairwise(words[begin:]) if after.text not in subject), words[-1])
        return last.end

    def named_in(self, ids: Sequence[int]) -> list[tuple[str, ...]]:
        """The subjects that a text is about: all words of theirs are in it."""
        here = {word.text for word in self.words.of(ids)}
        return [subject for subject in dict.fromkeys(self.of) if subject and here.issuperset(subject)]
