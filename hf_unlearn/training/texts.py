"""Rows of texts: the columns that hold question and answer, and texts longer than the model is trained on."""

from __future__ import annotations

import logging
from typing import Any

from datasets import Dataset

from .checks import shown
from .losses import IGNORED


logger = logging.getLogger(__name__)

# What instruction data call a prompt and its completion; the first of each that is there is taken.
PROMPTS = ("prompt", "question", "instruction", "query")
COMPLETIONS = ("completion", "answer", "output", "response")
CONTEXTS = ("input", "context")  # what an instruction or a question is about, often empty
KNOWN = ("messages", "conversations", "input_ids")  # what TRL takes as it is, beside the column of texts


def as_prompt_completion(dataset: Any, text_column: str, argument: str) -> Any:
    """The dataset with its columns as TRL's `SFTTrainer` knows them: `question` and `answer`, `instruction` and `output`,
    `prompt` and `response`, … become `prompt` and `completion`; an `input` or a `context` follows the prompt.

    Args:
        dataset (`Dataset`): rows; anything else is returned as it is.
        text_column (`str`): `dataset_text_field` of the settings.
        argument (`str`): what to call it in an error.

    Raises:
        ValueError: no columns with a known name.
    """
    names = getattr(dataset, "column_names", None)
    if (
        not isinstance(dataset, Dataset)
        or {text_column, *KNOWN} & set(names)
        or {"prompt", "completion"} <= set(names)
    ):
        return dataset
    prompt = next((name for name in PROMPTS if name in names), None)
    completion = next((name for name in COMPLETIONS if name in names), None)
    if prompt is None or completion is None:
        raise ValueError(
            f"{argument}: has columns {', '.join(names)}, none with texts; name them {text_column!r}, 'messages', or 'prompt' and "
            "'completion' (rename_column), or pass formatting_func="
        )
    renamed = {prompt: "prompt", completion: "completion"}
    dataset = dataset.rename_columns({old: new for old, new in renamed.items() if old != new})
    about = [name for name in CONTEXTS if name in names]
    if about:
        dataset = dataset.map(
            lambda row: {"prompt": "\n".join(filter(None, (row[name] for name in ("prompt", *about))))}
        )
    return dataset


def as_chat(
    dataset: Dataset, argument: str, *, system: str | None = None, template_kwargs: dict[str, Any] | None = None
) -> Dataset:
    """Questions and answers as conversations, so that they go through the chat template, without the spaces around them; rows of texts
    stay as they are.

    Args:
        dataset (`Dataset`): rows.
        argument (`str`): what to call it in an error.
        system (`str`, *optional*): what the system says first.
        template_kwargs (`dict`, *optional*): what the template is told, as in `{"date_string": "10 Apr 2025"}`: becomes the column
            `chat_template_kwargs`, which `SFTTrainer` reads.

    Raises:
        ValueError: no columns with a known name, or one that holds no texts.
    """
    dataset = as_prompt_completion(dataset, "text", argument)
    check_texts(dataset, "text", argument)
    if "completion" not in dataset.column_names:
        return dataset
    before = [{"role": "system", "content": system}] if system else []
    more = {"chat_template_kwargs": template_kwargs} if template_kwargs else {}

    def said(role: str, text: str | list) -> list[dict[str, str]]:
        return [{"role": role, "content": text.strip()}] if isinstance(text, str) else text

    return dataset.map(
        lambda row: {
            "prompt": before + said("user", row["prompt"]),
            "completion": said("assistant", row["completion"]),
            **more,
        }
    )


def check_texts(dataset: Any, text_column: str, argument: str) -> None:
    """Refuse columns of texts that hold something else.

    Raises:
        ValueError: naming the column and the row.
    """
    if not isinstance(dataset, Dataset):
        return
    names = (text_column,) if text_column in dataset.column_names else ("prompt", "completion")
    for name in {*names} & {*dataset.column_names}:
        check_text_column(dataset, name, argument, chats=name != text_column)


def check_text_column(dataset: Dataset, name: str, argument: str, *, chats: bool = True) -> None:
    """Refuse a column that holds something else than texts, or than messages where `chats` are allowed.

    Raises:
        ValueError: naming the column and the row.
    """
    for row, value in enumerate(dataset.with_format(None)[name]):
        is_chat = isinstance(value, list) and chats and all(isinstance(turn, dict) for turn in value)
        if not (isinstance(value, str) or is_chat):
            raise ValueError(
                f"{argument}: row {row} has {shown(value)} in column {name!r}, which is no text; mend or remove it"
            )


def check_template(dataset: Any, tokenizer: Any, argument: str) -> None:
    """Refuse conversations that `tokenizer` has no template for.

    Raises:
        ValueError: naming the column.
    """
    is_raw = isinstance(dataset, Dataset) and len(dataset) and "input_ids" not in dataset.column_names
    row = dataset[0] if is_raw else {}
    column = next((name for name in (*KNOWN[:2], "prompt", "completion") if isinstance(row.get(name), list)), None)
    if column and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{argument}: column {column!r} holds conversations, and the tokenizer has no chat template; take a chat model's tokenizer, "
            "set its chat_template, or give texts"
        )


def check_tokenized(dataset: Any, argument: str) -> None:
    """Refuse texts where token ids are needed.

    Raises:
        ValueError: rows of raw text.
    """
    names = getattr(dataset, "column_names", None) or (dataset[0].keys() if isinstance(dataset[0], dict) else ())
    texts = [name for name in ("text", *KNOWN[:2], *PROMPTS, *COMPLETIONS) if name in names]
    if texts and not {"input_ids", "inputs_embeds"} & set(names):
        raise ValueError(
            f"{argument}: column {texts[0]!r} holds raw texts; UnlearnSFTTrainer takes them, this trainer needs input_ids and "
            "labels (tokenize them, with data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False))"
        )


def fit_length(dataset: Dataset, max_length: int | None, mode: str, argument: str, *, whole: bool) -> Dataset:
    """Tokenised rows of `max_length` tokens at most.

    Args:
        dataset (`Dataset`): rows with `input_ids` and `labels`.
        max_length (`int`, *optional*): None leaves every row as it is.
        mode (`"keep_start"` | `"keep_end"`): which part of a longer text is kept.
        argument (`str`): what to call it in warnings and errors.
        whole (`bool`): nothing may be lost: longer texts are split into windows of `max_length` tokens that overlap by half, so
            that what is predicted in one has the half before it as context, and every token that counts does so once.

    Raises:
        ValueError: a row without a token that counts, where nothing may be lost; or no row with one.
    """
    rows = len(dataset)
    lengths = [len(labels) for batch in dataset.select_columns("labels").iter(1000) for labels in batch["labels"]]
    longer = [length for length in lengths if max_length is not None and length > max_length]
    if longer and whole:
        if max_length < 2:
            raise ValueError(f"max_length={max_length}: leaves no token to predict; raise it")
        dataset = dataset.map(
            _windows, batched=True, fn_kwargs={"size": max_length}, remove_columns=dataset.column_names
        )
        logger.warning(
            "%s: %d of %d texts are longer than max_length=%d and are split, which makes %d; raise it to read them whole",
            argument, len(longer), rows, max_length, len(dataset),
        )  # fmt: skip
    elif longer:
        part = slice(None, max_length) if mode == "keep_start" else slice(-max_length, None)
        cut = {"input_ids", "labels"}
        dataset = dataset.map(lambda row: {name: row[name][part] for name in cut})
    counting = dataset.filter(lambda row: any(label != IGNORED for label in row["labels"][1:]))
    if longer and not whole:
        logger.warning(
            "%s: %d of %d texts are longer than max_length=%d: %s tokens of them are cut off, and %d texts have nothing left that "
            "counts", argument, len(longer), rows, max_length, f"{sum(longer) - max_length * len(longer):,}",
            len(dataset) - len(counting),
        )  # fmt: skip
    empty = len(dataset) - len(counting)
    if empty and not longer and not whole and len(counting):
        logger.warning("%s: %d of %d texts have no token that counts and are left out", argument, empty, rows)
    if not len(counting) or (empty and whole):
        fix = f"raise max_length={max_length}" if longer else "remove them, or fill in what is to be answered"
        raise ValueError(f"{argument}: {empty or rows} of {rows} texts have no token that counts; {fix}")
    return counting


def _windows(rows: dict[str, list], size: int) -> dict[str, list]:
    """Rows of `size` tokens at most; other columns are repeated."""
    found: dict[str, list] = {name: [] for name in rows}
    for index, (ids, labels) in enumerate(zip(rows["input_ids"], rows["labels"], strict=True)):
        stop = 1  # tokens before it are predicted already; nothing predicts the first
        for begin in range(0, max(len(ids) - size, 0) + size // 2, size // 2) if len(ids) > size else [0]:
            begin = min(begin, max(len(ids) - size, 0))
            end = min(begin + size, len(ids))
            window = [IGNORED if place < stop else labels[place] for place in range(begin, end)]
            if any(label != IGNORED for label in window):
                for name, values in rows.items():
                    found[name].append({"input_ids": ids[begin:end], "labels": window}.get(name, values[index]))
            stop = end
    return found


def count_tokens(dataset: Dataset) -> int:
    """Tokens that are predicted and count in tokenised rows."""
    batches = dataset.select_columns("labels").iter(1000)
    return sum(int(label != IGNORED) for batch in batches for labels in batch["labels"] for label in labels[1:])
