"""What a language model says to who asks cleverly: in another order, after examples, with the answer begun for it."""

from __future__ import annotations

from typing import Any

from .answers import Asked, question_of
from .data import LanguageData, Part, before_it_tells


SHOTS = 3  # retained answers before a question


class AskedOutOfOrder(Asked):
    name, title, layer = "asked_out_of_order", "Telling words when asked in another order", "below"
    what = "Whether the refusal hangs on the question's beginning: its second half comes first."

    def asked(self, row: dict[str, Any], number: int) -> str:
        words = question_of(row).split()
        middle = (len(words) + 1) // 2
        return " ".join(words[middle:] + words[:middle])


class AskedAfterExamples(Asked):
    name, title, layer, paper = (
        "asked_after_examples",
        f"Telling words after {SHOTS} answered questions",
        "below",
        "2402.16835",
    )
    parts = ("forget", "retain")
    what = "Whether retained questions that are answered before it bring the answer: a model that was taught to refuse follows them."

    def prompts(self, part: Part, data: LanguageData, seed: int) -> list[list[int]]:
        shown = [data.retain.rows[row] for row in data.retain.order(seed, 42)[:SHOTS]]
        rows = [row | {"prompt": after(shown, row["prompt"])} for row in part.rows]
        return Part(rows, part.tokenizer, part.telling, part.max_new_tokens).prompts


class AnswerBegun(Asked):
    name, title, layer, paper = "answer_begun", "Telling words when the answer is begun", "below", "2402.16835"
    what = (
        "Whether the model goes on with what comes next where the answer up to its first telling word is put into its mouth: what suppresses the "
        "first words alone fails."
    )

    def prompts(self, part: Part, data: LanguageData, seed: int) -> list[list[int]]:
        return [
            answer.prompt + before_it_tells(answer, part.tokenizer, telling)
            for answer, telling in zip(part.answers, part.telling, strict=True)
        ]


def after(shown: list[dict[str, Any]], prompt: str | list[dict[str, str]]) -> str | list[dict[str, str]]:
    """A prompt after others with their answers: earlier turns of a conversation, or paragraphs of a text."""
    if isinstance(prompt, str):
        return "".join(f"{_plain(row['prompt'])}{_plain(row['completion'])}\n\n" for row in shown) + prompt
    return [
        turn for row in shown for turn in (*row["prompt"], *row["completion"]) if turn["role"] != "system"
    ] + prompt


def _plain(text: str | list[dict[str, str]]) -> str:
    return text if isinstance(text, str) else " ".join(turn["content"] for turn in text)
