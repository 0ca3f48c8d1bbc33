"""Words, and ways to ask for them: what is asked to forget a concept, what is asked instead, and what is kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache


# Kinds of words that pictures are asked for by. Written by hand; a word stands for its kind, no list is complete.
THINGS = {
    "number": "zero one two three four five six seven eight nine ten eleven twelve",
    "animal": "dog cat horse cow sheep pig bird eagle duck owl fish shark whale frog snake lion tiger bear wolf fox rabbit mouse elephant monkey",
    "person": "man woman boy girl baby doctor nurse teacher soldier farmer cook dancer singer king queen athlete",
    "vehicle": "car truck bus bicycle motorcycle train tram boat ship airplane helicopter rocket",
    "food": "apple banana orange lemon strawberry tomato carrot potato bread cake pizza cheese egg soup salad sandwich",
    "plant": "tree flower rose tulip sunflower cactus palm fern mushroom bush",
    "object": "chair table lamp bed sofa clock book cup bottle knife key phone camera computer umbrella backpack ball hammer candle mirror",
    "clothing": "shirt dress coat jacket skirt hat shoe boot glove scarf sweater sandal",
    "building": "house castle church temple tower bridge barn lighthouse factory skyscraper school windmill",
    "place": "beach forest mountain desert river lake garden street city village park kitchen",
    "instrument": "guitar piano violin drum trumpet flute harp cello saxophone banjo",
    "weapon": "sword gun rifle pistol bow spear cannon dagger axe shield",
}
LOOKS = {
    "colour": "red green blue yellow orange purple pink brown black white grey turquoise",
    "material": "wooden golden silver glass stone paper leather plastic marble woollen",
}
STYLES = {
    "technique": "watercolor,oil painting,pencil sketch,photograph,cartoon,engraving,mosaic,pixel art,woodcut,collage",
    "painter": "Rembrandt,Vermeer,Monet,Cézanne,Turner,Dürer,Goya,Hokusai,Botticelli,Rubens,Van Gogh,Titian",
}
KINDS: dict[str, list[str]] = {
    kind: words.split("," if "," in words else " ")
    for group in (THINGS, LOOKS, STYLES)
    for kind, words in group.items()
}
GENERIC = "thing"  # stands in where nothing of the kind is known

NAMED = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "a drawing of {}",
    "{} on a plain background",
    "a small picture of {}, in detail",
)
TEMPLATES = {
    "thing": (*NAMED, "a {}", "a photo of a {}", "a picture of a {}", "a painting of a {}", "a big {} and a small one", "a {} in the rain"),
    "name": (*NAMED, "a portrait of {}", "{} in the rain", "a close-up photo of {}", "{} in front of a wall"),
    "look": ("{}", "a {} thing", "a photo of a {} house", "a {} car in the street", "a picture of a {} cup", "something {}", "a {} background"),
    "style": ("{}", "a {}", "{} style", "a painting in the style of {}", "a portrait by {}", "a picture of a house, {}", "a landscape by {}"),
}  # fmt: skip
KEPT_TEMPLATES = {
    "thing": ("{}", "a photo of a {}", "a drawing of a {}", "a {} on a plain background"),
    "look": ("{}", "a {} background", "a {} thing"),
    "style": ("{}", "a portrait, {}", "a landscape in the style of {}", "a house, {}"),
}
SCENES = (
    "a {look} {thing}",
    "a photo of a {look} {thing} and a {other}",
    "a {thing} next to a {other}",
    "a picture of a {thing}, {style}",
)
EMPTY_SHARE = 0.05  # of what is kept is the empty prompt, which every guided image is drawn with


def kind_of(phrase: str) -> str | None:
    """The kind that lists a phrase or its last word, or the singular of them; None where none does."""
    for text in (phrase.casefold(), phrase.casefold().split()[-1]):
        for kind, words in KINDS.items():
            if any(text in (known.casefold(), plural(known).casefold()) for known in words):
                return kind
    return None


def templates_for(concept: str, kind: str | None) -> tuple[str, ...]:
    """Ways to ask for a concept; a capital letter makes it a name, which has no article."""
    if kind in STYLES:
        return TEMPLATES["style"]
    if kind in LOOKS:
        return TEMPLATES["look"]
    return TEMPLATES["name" if concept[:1].isupper() else "thing"]


def kept_prompts(without: Iterable[str] = ()) -> list[str]:
    """Some thousand different prompts over all kinds, made of templates and words; always the same ones.

    Args:
        without (`Iterable[str]`): concepts that no prompt may name.
    """
    named = naming(list(without))
    return [prompt for prompt in _kept() if not (named and named.search(prompt))]


@cache
def _kept() -> tuple[str, ...]:
    made = [
        filled(template, word)
        for group, kinds in (("thing", THINGS), ("look", LOOKS), ("style", STYLES))
        for kind in kinds
        for word in KINDS[kind]
        for template in KEPT_TEMPLATES[group]
    ]
    looks, things, styles = ([word for kind in group for word in KINDS[kind]] for group in (LOOKS, THINGS, STYLES))
    for number in range(3 * len(things)):
        thing, other = things[number % len(things)], things[(7 * number + 3) % len(things)]
        look, style = looks[(5 * number + number // len(things)) % len(looks)], styles[number % len(styles)]
        scene = SCENES[(number + number // len(things)) % len(SCENES)]
        words = {"{look}": look, "{thing}": thing, "{other}": other, "{style}": style}
        for slot, word in words.items():
            scene = filled(scene.replace(slot, "{}"), word)
        made.append(scene)
    return tuple(dict.fromkeys(made))


def neighbours(concepts: Iterable[str]) -> list[str]:
    """The other words of each concept's kind, asked for as the concepts are: what is harmed first where they go.

    Args:
        concepts (`Iterable[str]`): of which none is named.
    """
    concepts = list(concepts)
    kinds = dict.fromkeys(kind for concept in concepts if (kind := kind_of(concept)))
    made = [filled(template, word) for kind in kinds for word in KINDS[kind] for template in templates_for(word, kind)]
    named = naming(concepts)
    return [prompt for prompt in dict.fromkeys(made) if not named.search(prompt)]


def filled(template: str, word: str) -> str:
    """A template with a word in each of its `{}`; an article before it is "a" or "an" as the word wants."""
    parts = template.split("{}")
    return "".join(_agreeing(part, word) + word for part in parts[:-1]) + parts[-1]


def _agreeing(text: str, word: str) -> str:
    """`text` that ends where `word` begins, with its last article as `word` wants it; without, where `word` has its own."""
    found = re.search(r"\b([Aa])n?\s$", text)
    if found is None:
        return text
    before = text[: found.start()]
    if re.match(r"(an?|the)\s", word, re.IGNORECASE):
        return before
    return before + found[1] + ("n " if word[:1].casefold() in "aeiou" else " ")


def plural(word: str) -> str:
    """The regular plural of an English word."""
    if re.search(r"[^aeiou]y$", word):
        return f"{word[:-1]}ies"
    return f"{word}es" if re.search(r"(s|x|z|ch|sh)$", word) else f"{word}s"


def naming(concepts: Sequence[str]) -> re.Pattern[str] | None:
    """Finds whole words that name one of the concepts, in either case, also in the plural; None without concepts."""
    forms = sorted({form for concept in concepts for form in (concept, plural(concept))}, key=len, reverse=True)
    return re.compile(rf"(?<!\w)({'|'.join(map(re.escape, forms))})(?!\w)", re.IGNORECASE) if forms else None


def exchanged(prompt: str, anchors: Mapping[str, str]) -> str:
    """A prompt with every concept that it names exchanged for its anchor: capitals and plural stay, the article before it follows.

    Args:
        anchors (`Mapping[str, str]`): from concept to anchor.
    """
    forms = {plural(concept).casefold(): (concept, anchor and plural(anchor)) for concept, anchor in anchors.items()}
    forms |= {concept.casefold(): (concept, anchor) for concept, anchor in anchors.items()}
    named = naming(list(anchors))
    new, end = "", 0
    for found in named.finditer(prompt) if named else ():
        word = _in_the_case_of(found[1], *forms[found[1].casefold()])
        new += _agreeing(prompt[end : found.start()], word) + word
        end = found.end()
    return new + prompt[end:]


def _in_the_case_of(text: str, concept: str, anchor: str) -> str:
    if text.isupper() and len(text) > 1 and not concept.isupper():
        return anchor.upper()
    return anchor[:1].upper() + anchor[1:] if text[0].isupper() and not concept[0].isupper() else anchor
