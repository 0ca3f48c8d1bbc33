"""Influence of an example token by token, as a report keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from datasets import Dataset


COLUMNS = ("sample_id", "target", "piece", "score")


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Which tokens of an example taught a target.

    Attributes:
        sample_id: the example.
        target (`str`): what it taught.
        pieces (`tuple[str, ...]`): the text of each token; together they are the text that was trained on.
        scores (`np.ndarray`): `[length]`, what learning to predict each token did for the target: > 0 helped, < 0 harmed. No unit: compare
            them within the target. NaN where nothing is predicted, as in a prompt.
    """

    sample_id: Any
    target: str
    pieces: tuple[str, ...]
    scores: np.ndarray

    @property
    def total(self) -> float:
        """Of the example: the sum."""
        return float(np.nansum(self.scores))

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The k tokens that helped most, the most helpful first."""
        order = np.argsort(-self.scores, kind="stable")  # NaN last
        return [
            (self.pieces[place], float(self.scores[place])) for place in order[:k] if np.isfinite(self.scores[place])
        ]


def token_table(rows: Iterable[tuple[Any, str, Sequence[str], Any]]) -> Dataset:
    """Examples, targets, pieces and scores as a report keeps them."""
    from datasets import Dataset

    columns = zip(
        *((one, target, list(pieces), np.asarray(scores).tolist()) for one, target, pieces, scores in rows),
        strict=True,
    )
    return Dataset.from_dict(dict(zip(COLUMNS, map(list, columns), strict=True)))


def tokens_in(table: Dataset | None, sample_id: Any, target: str) -> TokenScores:
    """Of one example on one target.

    Raises:
        ValueError: they are not known.
    """
    if table is not None:
        for row, found in enumerate(zip(table["sample_id"], table["target"], strict=True)):
            if found == (sample_id, target):
                kept = table.with_format(None)[row]
                scores = np.array([np.nan if one is None else one for one in kept["score"]], dtype=float)
                return TokenScores(sample_id, target, tuple(kept["piece"]), scores)
    raise ValueError(
        f"sample_id={sample_id!r}: its tokens are not known for target {target!r}; see attribute_tokens(report, model, …)"
    )
