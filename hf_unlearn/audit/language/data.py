"""The rows of an audit of language models: prompts, answers, and the words by which an answer is recognised."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ...data import overlap
from ...modes import seeded_generator
from ...training.answers import Answer, as_pair, read_answer
from ...training.evaluation import ASKED_AGAIN, FALSE, TRUE, LanguageEvaluation
from ...training.texts import as_prompt_completion, check_template, check_texts


EXAMPLES = {"standard": 400, "quick": 100}  # at most so many rows of a part
LONGEST = 200  # tokens of an answer, at most
BATCH = 32
KEPT = 100  # retained rows at which is looked; more of them are trained on
COMMON, FEW = 0.02, 2  # a word in more answers than this share, and than so many, does not tell which one it is


@dataclass(frozen=True)
class Part:
    """Rows that are looked at, in the shape of `prompt` and `completion`, with TOFU's columns where they have them.

    Attributes:
        rows (`list[dict]`): as the trainers take them.
        tokenizer: the models'.
        telling (`list[tuple[str, ...]]`): of each answer the words by which it is recognised; see [`telling_words`].
        max_new_tokens (`int`): of a written answer; 0 where none is wanted.
    """

    rows: Sequence[dict[str, Any]]
    tokenizer: PreTrainedTokenizerBase
    telling: Sequence[tuple[str, ...]]
    max_new_tokens: int

    def __len__(self) -> int:
        return len(self.rows)

    def has(self, column: str) -> bool:
        return bool(self.rows) and column in self.rows[0]

    def select(self, rows: Iterable[int]) -> Part:
        rows = list(rows)
        return Part(
            [self.rows[row] for row in rows],
            self.tokenizer,
            [self.telling[row] for row in rows],
            self.max_new_tokens,
        )

    def order(self, seed: int, *key: int) -> list[int]:
        """Numbers of the rows, shuffled."""
        return torch.randperm(len(self), generator=seeded_generator("cpu", seed, *key)).tolist()

    @cached_property
    def answers(self) -> list[Answer]:
        return [read_answer(row, self.tokenizer) for row in self.rows]

    @property
    def prompts(self) -> list[list[int]]:
        return [answer.prompt for answer in self.answers]

    @cached_property
    def evaluation(self) -> LanguageEvaluation:
        rows, limit = Dataset.from_list(list(self.rows)), self.max_new_tokens
        return LanguageEvaluation(rows, self.tokenizer, batch_size=BATCH, max_new_tokens=limit)


class LanguageData:
    """The rows of an audit.

    Attributes:
        forget, retain (`Part`): rows that the original was trained on: those to be forgotten, and others.
        test (`Part`): rows that no model was trained on.
        tokenizer: the models'.
        forgotten (`str`): in words.
        written (`float`): what an answer that is written costs, in looks at an answer that is given; measured by `pace`.
    """

    written: float = 10.0

    def __init__(self, forget: Part, retain: Part, test: Part):
        self.forget, self.retain, self.test = forget, retain, test
        self.tokenizer, self.forgotten = forget.tokenizer, f"{len(forget)} examples"

    @cached_property
    def kept(self) -> Part:
        """Retained rows at which is looked."""
        return self.retain.select(range(min(KEPT, len(self.retain))))

    @property
    def parts(self) -> dict[str, Part]:
        return {name: getattr(self, name) for name in ("forget", "retain", "test")}

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(part) for name, part in self.parts.items()}

    @cached_property
    def digest(self) -> str:
        content = [
            [part.rows, part.telling, [answer.ids for answer in part.answers], part.max_new_tokens]
            for part in self.parts.values()
        ]
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def language_data(forget: Any, retain: Any, test: Any, *, processing_class: Any, size: str, seed: int) -> LanguageData:
    """Read the rows of an audit, at most [`EXAMPLES`] of a part, drawn by the seed. Checks that need retained or unseen rows are left out
    where there are none.

    Raises:
        ValueError: no tokenizer; a set that is missing, empty, without texts or of token ids, or that shares rows with the forget set.
    """
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        what = "is missing" if processing_class is None else f"{type(processing_class).__name__} is no tokenizer"
        raise ValueError(f"processing_class: {what}; pass the models' tokenizer")
    sets = {"forget": forget, "retain": retain, "test": test}
    for name, rows in sets.items():
        if rows is None and name != "forget":
            continue
        if not isinstance(rows, Dataset) or not len(rows):
            what = "missing" if rows is None else "is empty" if isinstance(rows, Dataset) else "is no datasets.Dataset"
            raise ValueError(f"{name}: {what}; pass a Dataset of questions and answers, or of texts")
        if name != "forget" and (shared := overlap(forget, rows, "id")):
            raise ValueError(f"{name}: {shared.replace('forget_dataset', 'forget')}; take them out")
    read: dict[str, list[dict[str, Any]]] = {}
    for key, (name, rows) in enumerate(sets.items()):
        if rows is not None:
            drawn = torch.randperm(len(rows), generator=seeded_generator("cpu", seed, key))[: EXAMPLES[size]]
            rows = rows.select(drawn.sort().values.tolist())
        # Of unseen rows false answers are not asked about.
        rewordings = (TRUE, *FALSE) if name != "test" else ()
        read[name] = [] if rows is None else _pairs(rows, name, processing_class, rewordings)
    every = [row for rows in read.values() for row in rows]
    counts = Counter(word for row in every for word in set(words_of(row["completion"])))
    few = max(FEW, COMMON * len(every))
    telling = {name: [telling_words(row, counts, few) for row in rows] for name, rows in read.items()}
    lengths = [len(read_answer(row, processing_class).counted) for row in read["forget"]]
    limit = min(LONGEST, 2 * max(lengths))
    forget, retain, test = (
        Part(read[name], processing_class, telling[name], 0 if name == "test" else limit) for name in sets
    )
    return LanguageData(forget, retain, test)


def _pairs(
    dataset: Dataset, argument: str, tokenizer: PreTrainedTokenizerBase, rewordings: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows with `prompt` and `completion`; of a plain text the words of its first half and those of its second."""
    texts = ("text", "messages", "conversations")
    if "input_ids" in dataset.column_names and not {*texts, "completion"} & {*dataset.column_names}:
        raise ValueError(
            f"{argument}: holds token ids, which cannot be asked in other words; pass the texts they are made of"
        )
    dataset = as_prompt_completion(dataset, "text", argument)
    check_texts(dataset, "text", argument)
    check_template(dataset, tokenizer, argument)
    kept = [name for name in (ASKED_AGAIN, "chat_template_kwargs", *rewordings) if name in dataset.column_names]
    found = []
    for number, row in enumerate(dataset.with_format(None)):
        try:
            pair = halves(row["text"]) if "text" in row else as_pair(row)
            pair = {name: pair[name] for name in ("prompt", "completion")} | {name: row[name] for name in kept}
            read_answer(pair, tokenizer)
        except ValueError as error:
            raise ValueError(f"{argument}: row {number} {error}") from error
        found.append(pair)
    return found


def halves(text: str) -> dict[str, str]:
    """A text as what is given and what is to come.

    Raises:
        ValueError: it has fewer than two words.
    """
    words = list(re.finditer(r"\S+", text))
    if len(words) < 2:
        raise ValueError("has fewer than two words, of which none can follow another; remove it")
    end = words[(len(words) + 1) // 2 - 1].end()
    return {"prompt": text[:end], "completion": text[end:]}


# Words


def words_of(text: str | Sequence[dict[str, str]] | None) -> list[str]:
    """The words of a text or of messages, in lower case."""
    if text is None:
        return []
    if not isinstance(text, str):
        text = " ".join(message["content"] for message in text)
    return re.findall(r"\w+", text.lower())


def telling_words(row: dict[str, Any], counts: Mapping[str, int], few: float) -> tuple[str, ...]:
    """The words by which an answer is recognised: those that its prompt does not have, nor its false answers, that it has in other words too,
    and that are in few answers, or in the fewest. What would leave no word is passed over.

    Args:
        row (`dict`): with `prompt` and `completion`, and TOFU's columns if it has them.
        counts (`dict`): of each word, answers that have it.
        few (`float`): answers that a word may be in.
    """
    false = next((row[name] for name in FALSE if row.get(name)), ())
    elsewhere = {word for text in ([false] if isinstance(false, str) else false) for word in words_of(text)}
    asked, again = set(words_of(row["prompt"])), set(words_of(row.get(TRUE)))
    found = list(dict.fromkeys(words_of(row["completion"])))
    for tells in (lambda word: word not in asked, lambda word: word not in elsewhere, lambda word: word in again):
        found = list(filter(tells, found)) or found
    few = max([few, *sorted(counts[word] for word in found)[:1]])
    return tuple(word for word in found if counts[word] <= few)


def told(texts: Sequence[str], part: Part) -> list[float]:
    """Share of each answer's telling words that a text has, `[rows]` in [0, 1]."""
    found = []
    for text, telling in zip(texts, part.telling, strict=True):
        said = set(words_of(text))
        found.append(sum(word in said for word in telling) / max(1, len(telling)))
    return found


def before_it_tells(answer: Answer, tokenizer: PreTrainedTokenizerBase, telling: Sequence[str]) -> list[int]:
    """The tokens of an answer before its first telling word."""
    text = tokenizer.decode(answer.counted, skip_special_tokens=True)
    place = next((word.start() for word in re.finditer(r"\w+", text) if word[0].lower() in telling), 0)
    fit = (
        count
        for count in range(len(answer.counted), 0, -1)
        if len(tokenizer.decode(answer.counted[:count], skip_special_tokens=True)) <= place
    )
    return answer.counted[: next(fit, 0)]
