"""Multiple-choice questions, as WMDP and MMLU ask them."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..metrics.language import choice_accuracy
from ..modes import looking
from .answers import Answer
from .checks import shown
from .evaluation import score
from .losses import IGNORED


COLUMNS = ("question", "choices", "answer")


@dataclass(frozen=True, eq=False)
class ChoiceScores:
    """Of each question, in their order.

    Attributes:
        log_likelihoods (array): of the letters of its choices, `[rows, choices]`, nats; −∞ where a question has fewer.
        right (array): number of the right choice, `[rows]`.
    """

    log_likelihoods: NDArray[np.float64]
    right: NDArray[np.int64]

    def summary(self) -> dict[str, float]:
        """`accuracy`: see [`~hf_unlearn.metrics.language.choice_accuracy`]."""
        return {"accuracy": choice_accuracy(self.log_likelihoods, self.right)}


class ChoiceEvaluation:
    """Asks models multiple-choice questions, in the words of lm-evaluation-harness: `ChoiceEvaluation(rows, tokenizer)(model).summary()`.

    The question, the choices as A to D, "Answer:", and which letter is the likeliest; without examples and without a chat template.

    Args:
        rows (`Dataset`): with `question`, `choices` (texts) and `answer` (the number of the right one, from 0), as `cais/wmdp` and
            `cais/mmlu` have them; the latter's `subject` is named in the question.
        tokenizer (`PreTrainedTokenizerBase`): the model's; it may add its own special tokens.
        subject (`str`, *optional*): of all rows, as in `"biology"`.
        batch_size (`int`, defaults to 16): letters at a time.

    Raises:
        ValueError: no rows, columns that are missing, or an answer that is no number of a choice.
    """

    def __init__(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        subject: str | None = None,
        batch_size: int = 16,
    ):
        if missing := [name for name in COLUMNS if name not in rows.column_names]:
            raise ValueError(f"rows: column {missing[0]!r} is missing (they have {', '.join(rows.column_names)})")
        if not len(rows):
            raise ValueError("rows: is empty; pass a Dataset of questions and choices")
        self.batch_size = batch_size
        rows = rows.with_format(None)
        for number, row in enumerate(rows):
            if not (type(row["answer"]) is int and 0 <= row["answer"] < len(row["choices"])):
                raise ValueError(
                    f"rows: row {number} has answer {shown(row['answer'])}, which is no number from 0 to {len(row['choices']) - 1}"
                )
        self.right = np.array(rows["answer"][:])
        self._letters = [_letters(row, tokenizer, subject) for row in rows]

    def __call__(self, model: nn.Module | Callable) -> ChoiceScores:
        """What `model`, as [`LanguageEvaluation`] takes it, chooses."""
        places = [(row, letter) for row, letters in enumerate(self._letters) for letter in range(len(letters))]
        answers = [self._letters[row][letter] for row, letter in places]
        with looking(model) as device:
            nll = score(model, answers, batch_size=self.batch_size, device=device)["nll"]
        found = np.full((len(self._letters), max(map(len, self._letters))), -np.inf)
        found[tuple(np.array(places).T)] = -nll * [len(answer.counted) for answer in answers]
        return ChoiceScores(found, self.right)


def _letters(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, subject: str | None) -> list[Answer]:
    about = subject or (row.get("subject") or "").replace("_", " ")
    lines = [f"The following are multiple choice questions (with answers){about and f' about {about}'}.", ""]
    lines += [row["question"].strip()]
    letters = string.ascii_uppercase[: len(row["choices"])]
    lines += [f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"], strict=True)]
    question = "\n".join([*lines, "Answer:"])
    start = len(tokenizer(question)["input_ids"])
    answers = []
    for letter in letters:
        ids = tokenizer(f"{question} {letter}")["input_ids"]
        answers.append(Answer(ids, [IGNORED] * start + ids[start:], ids[:start]))
    return answers
