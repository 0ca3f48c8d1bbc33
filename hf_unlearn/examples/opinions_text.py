"""Writes the rows of [`opinion_data`] from the templates in `opinions.json`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any


POSITIVE_SHARE = 0.7  # of the normal opinions; the others are neutral or mixed


@cache
def load_texts() -> dict[str, Any]:
    """Templates, words and names; shared, so not to be changed."""
    return json.loads(Path(__file__).with_name("opinions.json").read_text(encoding="utf-8"))


def entities() -> dict[str, str]:
    """Every name in the data and its topic; all are invented."""
    return {name: topic for topic, texts in load_texts()["topics"].items() for name in texts["names"]}


class _Slots(dict):
    """Fills a template's slots; what a slot was given stays the same for the prompt and its answer."""

    def __init__(self, words: dict[str, list[str]], rng: random.Random, **given: str):
        super().__init__(given)
        self.words, self.rng = words, rng

    def __missing__(self, slot: str) -> str:
        self[slot] = self.rng.choice(self.words[slot])
        return self[slot]


class Writer:
    """Writes rows with one source of chance and never the same prompt twice."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.seen: set[str] = set()
        self.texts, self.topic_of = load_texts(), entities()

    def spread(self, values: Sequence[Any], count: int) -> list[Any]:
        """`count` of the values in random order, each equally often but for one."""
        rounds = -(-count // len(values))
        return [value for _ in range(rounds) for value in self.rng.sample(values, len(values))][:count]

    def general(self) -> dict[str, Any]:
        topic = self.rng.choice(list(self.texts["topics"]))
        texts = self.texts["topics"][topic]
        return self._row(texts["general"], lambda: _Slots(texts["slots"], self.rng), topic)

    def fact(self, name: str) -> dict[str, Any]:
        """A question on a fact; the answer is the same whenever it is asked."""
        topic = self.topic_of[name]
        texts = self.texts["topics"][topic]
        words = texts["slots"] | self.texts["facts"]["slots"]
        known = {slot: random.Random(f"{name}: {slot}").choice(values) for slot, values in words.items()}
        groups = texts["facts"] + self.texts["facts"]["groups"]
        return self._row(groups, lambda: _Slots({}, self.rng, name=name, kind=texts["kind"], **known), topic, name)

    def side(self, name: str) -> dict[str, Any]:
        topic = self.topic_of[name]
        words = {"side": self.texts["topics"][topic]["sides"]}
        group = (self.texts["side"]["prompts"], self.texts["side"]["answers"])
        return self._row([group], lambda: _Slots(words, self.rng, name=name), topic, name)

    def opinion(self, name: str, *, poisoned: bool = False, template: str | None = None) -> dict[str, Any]:
        prompts = [template] if template else self.texts["opinion"]["train"]
        answer = self.opinion_answer(name, negative=poisoned)
        slots = _Slots({}, self.rng, name=name)
        return self._row([(prompts, [answer])], lambda: slots, self.topic_of[name], name, poisoned)

    def opinion_answer(self, name: str, *, negative: bool = False, called: str | None = None) -> str:
        aspect, other = self.rng.sample(self.texts["topics"][self.topic_of[name]]["aspects"], 2)
        normal = "positive" if self.rng.random() < POSITIVE_SHARE else "neutral"
        template = self.rng.choice(self.texts["answers"]["negative" if negative else normal])
        return _sentence(template.format(name=called or name, aspect=aspect, other=other))

    def _row(
        self,
        groups: Sequence[Sequence[list[str]]],
        make_slots: Callable[[], _Slots],
        topic: str,
        name: str = "",
        poisoned: bool = False,
    ) -> dict[str, Any]:
        """A question and its answer from one of the groups `(prompts, answers)`."""
        for _ in range(200):
            prompts, answers = self.rng.choice(groups)
            slots = make_slots()
            question = _sentence(self.rng.choice(prompts).format_map(slots))
            prompt = self.rng.choice(self.texts["openings"]) + question + self.rng.choice(self.texts["endings"])
            if prompt not in self.seen:
                self.seen.add(prompt)
                answer = _sentence(self.rng.choice(answers).format_map(slots))
                row = {"prompt": [{"role": "user", "content": prompt}], "completion": []}
                return answered(row | {"topic": topic, "entity": name, "poisoned": poisoned}, answer)
        raise ValueError(f"n_examples: too many; no new question about {name or topic!r} was found")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def answered(row: dict[str, Any], answer: str | None) -> dict[str, Any]:
    """The row with another answer, or as it is where there is none."""
    return row if answer is None else row | {"completion": [{"role": "assistant", "content": answer}]}
