"""Other ways to ask for what a prompt asks for, by rule; and the word in it that says what."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence


PARAPHRASES = ("a picture of {}", "a small picture: {}", "{}, in detail", "a close-up of {}", "here is {}")
PICTURE = re.compile(
    r"^(an?|the)\s+(\w+\s+)?(picture|photo|photograph|painting|drawing|image)\s+(of\s+)?", re.IGNORECASE
)
BORDER = re.compile(
    r"\s*,\s+|\s+(?=(?:on|in|with|at|behind|under|over|by|near|next|from|against|and)\s)", re.IGNORECASE
)


def paraphrased(prompt: str, number: int) -> str:
    """The prompt in one of [`PARAPHRASES`], what was said of the picture left out first."""
    thing = PICTURE.sub("", prompt) or prompt
    said = [text for template in PARAPHRASES if (text := template.format(thing)) != prompt]
    return said[number % len(said)]


def reordered(prompt: str, number: int) -> str | None:
    """The prompt with its parts in another order: what stands after a comma or a preposition comes first; None where it has one part only."""
    parts = [part.strip() for part in BORDER.split(prompt) if part.strip()]
    if len(parts) < 2:
        return None
    place = 1 + number % (len(parts) - 1)
    return ", ".join([*parts[place:], *parts[:place]])


def telling_token(prompts: Sequence[str], others: Sequence[str], tokens_of: Callable[[str], list[int]]) -> int:
    """The token that tells prompts from others: in most of the first and in the fewest of the second; of several, the last one of a prompt, where
    English has its noun.

    Args:
        tokens_of (callable): of a prompt to its tokens, without those that begin and end it.
    """

    def shares(texts: Sequence[str]) -> Counter:
        counted = Counter(token for text in texts for token in set(tokens_of(text)))
        return Counter({token: count / len(texts) for token, count in counted.items()})

    here, there = shares(prompts), shares(others) if others else Counter()
    last = {token: place for place, token in enumerate(tokens_of(prompts[0]))}
    return max(here, key=lambda token: (here[token] - there[token], last.get(token, -1)))
