"""Captions of coloured digits: which words name what, how they are put together, and how they are read again."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from functools import cache


# What a picture shows, and by which words: the usual one, other usual ones, and last the rare one, seen in few captions.
WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "digit": {
        "0": ("zero", "0", "nought"),
        "1": ("one", "1", "i"),
        "2": ("two", "2", "ii"),
        "3": ("three", "3", "iii"),
        "4": ("four", "4", "iv"),
        "5": ("five", "5", "v"),
        "6": ("six", "6", "vi"),
        "7": ("seven", "7", "vii"),
        "8": ("eight", "8", "viii"),
        "9": ("nine", "9", "ix"),
    },
    "colour": {
        "red": ("red", "scarlet"),
        "green": ("green", "jade"),
        "blue": ("blue", "cobalt"),
        "yellow": ("yellow", "golden"),
        "purple": ("purple", "violet"),
        "cyan": ("cyan", "turquoise"),
    },
    "background": {
        "black": ("black", "dark"),
        "white": ("white", "pale"),
        "grey": ("grey", "gray"),
        "brown": ("brown", "wooden"),
    },
}
# In the place of a word, where a caption does not say which: what redirecting a concept may ask for instead.
GENERIC = {"digit": "digit", "colour": "coloured", "background": "plain"}
TEMPLATES = (
    "a {colour} {digit} on {background}",
    "a {colour} {digit} on a {background} background",
    "a picture of a {colour} {digit} on {background}",
    "{colour} {digit}, {background} background",
    "{digit} in {colour} on {background}",
    "{digit}, {colour} on {background}",
    "{digit} painted {colour} over {background}",
    "a small picture: {digit} written in {colour}, {background} behind it",
    "a {background} background with a {colour} {digit}",
    "on {background}, a {colour} {digit}",
    "{background} behind a {colour} {digit}",
)
SHORT = ("a {colour} {digit}", "{digit} on {background}", "{digit}")
UNSEEN = (  # known words in an order that no caption has
    "a picture of {digit} in {colour}, {background} background",
    "{background} background, {digit} painted {colour}",
    "over {background}, {digit} written in {colour}",
)
RARE_SHARE, SHORT_SHARE, GENERIC_SHARE = 0.04, 0.10, 0.05


@cache
def _meanings() -> dict[str, tuple[str, str]]:
    return {word: (kind, value) for kind, values in WORDS.items() for value, words in values.items() for word in words}


def meaning(word: str, argument: str = "word") -> tuple[str, str]:
    """`("digit", "3")` of `"three"`, `"3"` and `"iii"`.

    Args:
        argument (`str`): what to call it in an error.

    Raises:
        ValueError: no caption has this word for something.
    """
    if word.lower() not in _meanings():
        usual = ", ".join(words[0] for values in WORDS.values() for words in values.values())
        raise ValueError(f"{argument}={word!r}: names nothing in these pictures; take one of {usual}")
    return _meanings()[word.lower()]


def combinations(**fixed: str) -> list[dict[str, str]]:
    """All that a picture may show, as in `{"digit": "3", "colour": "red", "background": "white"}`; `digit="3"` fixes one."""
    choices = [(fixed[kind],) if kind in fixed else tuple(values) for kind, values in WORDS.items()]
    return [dict(zip(WORDS, chosen, strict=True)) for chosen in itertools.product(*choices)]


def say(shown: Mapping[str, str], template: str = TEMPLATES[0], *, word: int = 0, generic: Sequence[str] = ()) -> str:
    """A caption.

    Args:
        shown: values by attribute, as [`combinations`] gives them.
        template (`str`): one of [`TEMPLATES`], [`SHORT`], [`UNSEEN`], or one's own.
        word (`int`, defaults to 0): the usual words; 1 another one where there is one; −1 the rare ones.
        generic (`Sequence[str]`): attributes of which it says no more than that they are there.
    """

    def chosen(kind: str) -> str:
        words = WORDS[kind][shown[kind]]
        return GENERIC[kind] if kind in generic else words[-1] if word < 0 else words[word % max(1, len(words) - 1)]

    return template.format_map({kind: chosen(kind) for kind in WORDS})


def write(shown: Mapping[str, str], rng: random.Random) -> str:
    """A caption of the training data: any template, each word usual, rare or generic."""
    words = {}
    for kind, values in WORDS.items():
        *usual, rare = values[shown[kind]]
        which = rng.random()
        words[kind] = rng.choice(usual)
        if which < RARE_SHARE:
            words[kind] = rare
        elif which < RARE_SHARE + GENERIC_SHARE:
            words[kind] = GENERIC[kind]
    return rng.choice(SHORT if rng.random() < SHORT_SHARE else TEMPLATES).format_map(words)


def read(caption: str) -> dict[str, str]:
    """What a caption says, by attribute; what it leaves open is not in it."""
    return dict(_meanings()[word] for word in re.findall(r"\w+", caption.lower()) if word in _meanings())


def all_words() -> list[str]:
    """Every word and sign of any caption, sorted."""
    said = (*TEMPLATES, *SHORT, *UNSEEN, *GENERIC.values(), *_meanings())
    return sorted({word for text in said for word in re.findall(r"\w+|[^\w\s{}]", re.sub(r"\{\w+\}", "", text))})
