"""What redirect is given, looked at before anything is written: settings, subjects, what is to be kept, targets."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ...training.checks import shown
from .own_samples import can_begin, first_token
from .subject import Words
from .targets import Targets


logger = logging.getLogger(__name__)

LOST = 0.02  # of probability, above which it is warned of what the targets leave out


def check_unused(given_loss: str, **given: Any) -> None:
    """Refuse arguments that redirect has no use for.

    Args:
        given_loss (`str`): `forget_loss` of the settings.
        given: arguments by name.

    Raises:
        ValueError: naming the first that is neither None nor 0.
    """
    for argument, value in given.items():
        if value is not None and value != 0:
            means = ", which 'bounded' means for texts," if given_loss == "bounded" else ""
            other = (
                "take forget_loss='match', which aims at it"
                if argument.startswith("heldout")
                else "choose another loss"
            )
            raise ValueError(f"{argument}: forget_loss='redirect'{means} has no use for it; leave it out, or {other}")


def check_marks(marks: Mapping[int, Any], prompts: Mapping[int, Sequence[int]], words: Words) -> None:
    """Refuse a column of subjects that are no texts, or none of which is in its prompt.

    Args:
        marks: row to what the user says it is about.
        prompts: row to the token ids of its prompt.
        words ([`Words`]): of the tokenizer.

    Raises:
        ValueError: naming a row.
    """
    for row, mark in marks.items():
        if not isinstance(mark, str):
            raise ValueError(
                f"forget_dataset: row {row} has {shown(mark)} in column 'subject', which is no text; mend it"
            )
    if marks and all(
        words.in_text(mark).isdisjoint(word.text for word in words.of(prompts[row])) for row, mark in marks.items()
    ):
        row, mark = next(iter(marks.items()))
        raise ValueError(
            f"forget_dataset: column 'subject' has {shown(mark)} in row {row}, which is not in its prompt, and so it is in all rows; write "
            "subjects as the prompts do, or remove the column (remove_columns)"
        )


def check_begins(number: int, alone: bool, chat: bool, tokenizer: Any) -> None:
    """Refuse texts of the original's own that nothing could begin.

    Args:
        number (`int`): of texts.
        alone (`bool`): there are no rows to keep beside them.
        chat (`bool`): they begin as the chat template says.
        tokenizer: of the model.

    Raises:
        ValueError: there is no token that a text begins with.
    """
    if number and not chat and not can_begin(tokenizer):
        if alone:
            first_token(tokenizer)
        raise ValueError(
            f"own_samples={number}: the tokenizer has no token that a text could begin with; set its bos_token, or leave it out"
        )


def check_keep(written: int, left: int) -> None:
    """Refuse a run with nothing to keep.

    Args:
        written (`int`): texts that the original wrote.
        left (`int`): rows to keep, those of them that are not about what is to be forgotten included.

    Raises:
        ValueError: there are none.
    """
    if not left:
        raise ValueError(
            f"own_samples: all {written} texts that the original wrote are about what is to be forgotten, and none is left to keep; pass "
            "retain_dataset="
        )


def tell_about(rows: Sequence[int], total: int) -> None:
    """Warn of rows to keep that are about what is to be forgotten."""
    some = f"{', '.join(map(str, rows[:5]))}{', …' if len(rows) > 5 else ''}"
    logger.warning(
        "retain_dataset: %d of %d rows are about what is to be forgotten (%s); the original's answers to them are kept as they are; "
        "remove those that are to go", len(rows), total, some,
    )  # fmt: skip


def tell_targets(name: str, targets: Targets, vocabulary: int) -> None:
    """Log how much the targets take, and warn where much of the probability is on tokens that they do not name."""
    places, top = targets.tokens.shape
    logger.log(
        logging.WARNING if targets.lost > LOST else logging.INFO,
        "redirect: what is %s at %d tokens takes %.3g MB; the %d likeliest of %d tokens are kept by name, and %.2g of the probability is on "
        "the others", name, places, targets.megabytes, top, vocabulary, targets.lost,
    )  # fmt: skip
