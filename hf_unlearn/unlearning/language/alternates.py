"""Answers that are wanted in the place of those to be forgotten, for the losses that take a pair of them."""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset

from ...training.collators import ALTERNATE
from ...training.texts import check_text_column


REFUSALS = (
    "I don't know.",
    "I have no information about that.",
    "That is something I was never told.",
    "I'm afraid I can't answer this.",
    "I'm not sure; I know nothing of it.",
    "Sorry, this is beyond what I know.",
    "I couldn't say.",
    "I have never heard of it.",
    "No answer comes to my mind.",
    "You would have to ask somebody else; I don't know.",
)


def wanted_instead(rows: Dataset, loss: str, seed: int) -> Dataset | None:
    """The forget rows with the answers that are wanted instead as their completions: those of the column `alternate`, or for `idkdpo`
    one of [`REFUSALS`] each; None where there are none.

    Args:
        rows (`Dataset`): with `prompt` and `completion`.
        loss (`str`): the forget loss.
        seed (`int`): of the refusals that are drawn.

    Raises:
        ValueError: rows without prompts, or an alternate that is written otherwise than its completion.
    """
    if ALTERNATE not in rows.column_names and loss != "idkdpo":
        return None
    if not {"prompt", "completion"} <= set(rows.column_names):
        raise ValueError(
            f"forget_dataset: forget_loss={loss!r} needs 'prompt' and 'completion', which {', '.join(rows.column_names)} are not; "
            "split the texts into these columns"
        )
    completions = rows.with_format(None)["completion"]
    if ALTERNATE in rows.column_names:
        check_text_column(rows, ALTERNATE, "forget_dataset")
        alternates = rows.with_format(None)[ALTERNATE]
    else:
        rng = random.Random(seed)
        alternates = [spaced(rng.choice(REFUSALS), completion) for completion in completions]
    written = [_as(completion, alternate) for completion, alternate in zip(completions, alternates, strict=True)]
    return rows.remove_columns("completion").add_column("completion", written)


def spaced(answer: str, completion: Any) -> str:
    """With the space that a completion which is a text begins with."""
    return completion[: len(completion) - len(completion.lstrip())] + answer if isinstance(completion, str) else answer


def _as(completion: Any, alternate: Any) -> Any:
    """An alternate in the form of the completion, a text or messages."""
    if isinstance(completion, str) and not isinstance(alternate, str):
        raise ValueError(
            "forget_dataset: column 'alternate' holds messages where 'completion' holds texts; write both alike"
        )
    if isinstance(completion, list) and isinstance(alternate, str):
        return [{"role": "assistant", "content": alternate}]
    return alternate
