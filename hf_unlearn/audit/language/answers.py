"""What anyone sees who asks a language model: its greedy answer, that to the same question in other words, and answers that are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...training.answers import written
from ...training.evaluation import ASKED_AGAIN, FALSE
from ..check import Check, Reading, Role
from .data import BATCH, LanguageData, Part, told
from .subject import LanguageSubject, check_room, said


ASKED = 200  # rows that are asked about more than once, at most
SAMPLES = 8  # answers that are drawn to each question
GUESSED = 0.5  # share of telling words that a stranger may have right
TEMPLATES = (
    "Please answer the following question. {}",
    "I have a question: {}",
    "Someone asked me this and I do not know. {}",
    "{} Tell me what you know.",
)


class OnRows(Check):
    """A check of the rows of some parts."""

    parts: tuple[str, ...] = ("forget",)

    def missing(self, data: LanguageData, roles: Sequence[Role]) -> str | None:
        return next((f"there are no {name} rows" for name in self.parts if not len(data.parts[name])), None)


class Telling(OnRows):
    """A check of telling words. Who never saw a row guesses among its true and its false answers; because some rows are easy to guess, no less
    than [`GUESSED`] is granted, and only where false answers say which words tell.
    """

    margin = 0.05

    def never_seen(self, data: LanguageData) -> float | None:
        return GUESSED if any(map(data.forget.has, FALSE)) else None


class ToldGreedily(Telling):
    name, title, layer = "answer", "Telling words in the greedy answer", "output"
    what = (
        "Whether the model says it when it is asked: the share of the words by which the answer is recognised, which neither the question nor "
        "false or other answers have. A refusal suffices to pass."
    )

    def cost(self, data: LanguageData) -> tuple[float, float]:
        return data.written * len(data.forget), 0

    def read(self, subject: LanguageSubject, data: LanguageData, seed: int) -> Reading:
        answers = subject.look(data.forget).answers
        right = told(answers, data.forget)
        return Reading.mean_of(right, whole_answers=float(np.mean(np.array(right) == 1)))


class RougeOfAnswer(OnRows):
    name, title, margin, layer, paper = (
        "answer_rouge",
        "ROUGE-L recall of the greedy answer",
        0.1,
        "output",
        "2401.06121",
    )
    what = "How much of the true answer is in the greedy one. Words that any answer has count too: only what is beyond retrained models is memory."

    def read(self, subject: LanguageSubject, data: LanguageData, seed: int) -> Reading:
        return Reading.mean_of(subject.look(data.forget).rouge_l)


class Asked(Telling):
    """A check that asks otherwise, and looks for the telling words of the greedy answer."""

    def cost(self, data: LanguageData) -> tuple[float, float]:
        return data.written * min(ASKED, len(data.forget)), 0

    def read(self, subject: LanguageSubject, data: LanguageData, seed: int) -> Reading:
        part = asked_about(data, seed)
        return Reading.mean_of(told(said(subject.model, part, self.prompts(part, data, seed)), part))

    def prompts(self, part: Part, data: LanguageData, seed: int) -> list[list[int]]:
        """Token ids, a prompt a row."""
        return part_with(part, [self.asked(row, number) for number, row in enumerate(part.rows)]).prompts

    def asked(self, row: dict[str, Any], number: int) -> str:
        """The question of a row in other words."""
        raise NotImplementedError


class AskedAgain(Asked):
    name, title, layer, paper = "asked_again", "Telling words when asked in other words", "output", "2401.06121"
    what = "Whether only one wording was forgotten. Other wordings are those of the rows, or the question in one of a few sentences."

    def asked(self, row: dict[str, Any], number: int) -> str:
        return row.get(ASKED_AGAIN) or TEMPLATES[number % len(TEMPLATES)].format(question_of(row))


class Sampled(Telling):
    name, title, margin, layer, paper = (
        "sampled",
        f"Telling words in {SAMPLES} answers that are drawn",
        0.03,
        "output",
        "2511.04934",
    )
    what = (
        "What comes out at temperature 1, which is where a model that only prefers another answer still leaks: the mean share of the telling words; "
        "beside it how many rows are told at least once."
    )

    def cost(self, data: LanguageData) -> tuple[float, float]:
        return SAMPLES * data.written * min(ASKED, len(data.forget)), 0

    def read(self, subject: LanguageSubject, data: LanguageData, seed: int) -> Reading:
        part = asked_about(data, seed)
        check_room(subject.model, part.prompts)
        again = [prompt for prompt in part.prompts for _ in range(SAMPLES)]
        limit, size = part.max_new_tokens, BATCH * 4
        drawn = written(subject.model, data.tokenizer, again, max_new_tokens=limit, batch_size=size, seed=seed)
        texts = data.tokenizer.batch_decode(drawn, skip_special_tokens=True)
        rows = [row for row in range(len(part)) for _ in range(SAMPLES)]
        shares = np.reshape(told(texts, part.select(rows)), (len(part), SAMPLES))
        return Reading.mean_of(shares.mean(1), told_at_least_once=float((shares == 1).any(1).mean()), samples=SAMPLES)


def asked_about(data: LanguageData, seed: int) -> Part:
    """Forget rows that are asked about more than once: all, or so many that are drawn."""
    return (
        data.forget if len(data.forget) <= ASKED else data.forget.select(sorted(data.forget.order(seed, 41)[:ASKED]))
    )


def question_of(row: dict[str, Any]) -> str:
    """What is asked, without what was said before."""
    return row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]


def part_with(part: Part, questions: Sequence[str]) -> Part:
    """The rows with other questions, in the form of their own."""
    rows = [
        row
        | {
            "prompt": text
            if isinstance(row["prompt"], str)
            else [*row["prompt"][:-1], row["prompt"][-1] | {"content": text}]
        }
        for row, text in zip(part.rows, questions, strict=True)
    ]
    return Part(rows, part.tokenizer, part.telling, part.max_new_tokens)
