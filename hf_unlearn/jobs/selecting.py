"""Which rows a recipe forgets, keeps, and measures on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .. import data


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

from ..examples.datasets import load, one_split
from .keys import card_of_dataset


class Selection(Protocol):
    """The keys of a recipe that name rows."""

    dataset: str | None
    dataset_revision: str | None
    split: str
    forget_column: str | None
    forget_values: list[str] | None
    forget_ids: list[str] | None
    forget_dataset: str | None
    retain: bool
    eval_split: str | None
    heldout_split: str | None


@dataclass(frozen=True)
class Parts:
    """The rows that a job is about.

    Attributes:
        evaluation (`dict[str, Dataset]`): to measure `"forget"` and `"retain"` on.
        splits (`dict[str, str]`): that those are of.
        dataset (`str`, *optional*): its folder, or its id on the Hub.
    """

    forget: Dataset | None = None
    retain: Dataset | None = None
    heldout: Dataset | None = None
    evaluation: dict[str, Dataset] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    dataset: str | None = None

    @property
    def card_values(self) -> dict[str, Any]:
        """What a card says of them."""
        return card_of_dataset(self.dataset)


def select(job: Selection, id_column: str) -> Parts:
    """Load and split the data of a job.

    Raises:
        ValueError: naming the key that does not fit the data.
    """
    splits = load(job.dataset, revision=job.dataset_revision) if job.dataset else None
    forget, rest = _forget_and_rest(job, splits, id_column)
    if job.retain and rest is None:
        raise ValueError(
            f"retain: forget_dataset has no column {id_column!r} in common with {job.dataset!r}, so what to keep is not "
            "known; set id_column, or use forget_ids"
        )
    evaluation = {}
    if job.eval_split:
        rows = one_split(splits, "eval_split", job.eval_split)
        if job.forget_column:
            evaluation["forget"], evaluation["retain"] = _by_values(rows, job, key=f"eval_split={job.eval_split!r}: ")
        else:
            evaluation = {"forget": forget, "retain": _without(rows, forget, id_column)}
    return Parts(
        forget=forget,
        retain=rest if job.retain else None,
        heldout=one_split(splits, "heldout_split", job.heldout_split) if job.heldout_split else None,
        evaluation={name: rows for name, rows in evaluation.items() if rows is not None and len(rows)},
        splits={"forget": job.eval_split if job.forget_column else job.split, "retain": job.eval_split},
        dataset=job.dataset,
    )


def rows_of(word: str, key: str, split: str = "train") -> Dataset:
    """Rows as a recipe names them: `NAME`, `NAME:CONFIG` or `NAME:CONFIG:SPLIT`, as in `"locuslab/TOFU:forget10"`.

    Args:
        word (`str`): see [`hf_unlearn.examples.datasets.load`] for `NAME`; a folder's may have colons.
        key (`str`): that it is the value of, for errors.
        split (`str`, defaults to `"train"`): where none is named and there are several.

    Raises:
        ValueError: there are no such rows.
    """
    name, config, named = place(word)
    splits = load(name, config=config, argument=key)
    if named is None and len(splits) == 1:
        return next(iter(splits.values()))
    return one_split(splits, key, named or split)


def place(word: str) -> tuple[str, str | None, str | None]:
    """Name, config and split of rows as [`rows_of`] reads them."""
    parts = [word] if Path(word).exists() else word.split(":")
    name, config, split = (*parts, None, None)[:3]
    return name, config or None, split or None


def _forget_and_rest(job: Selection, splits: DatasetDict | None, id_column: str) -> tuple[Dataset, Dataset | None]:
    if job.forget_dataset:
        forget = rows_of(job.forget_dataset, "forget_dataset", job.split)
        return forget, _without(one_split(splits, "split", job.split), forget, id_column) if job.retain else None
    rows = one_split(splits, "split", job.split)
    if job.forget_column:
        return _by_values(rows, job)
    if id_column not in rows.column_names:
        raise ValueError(f"id_column: {id_column!r} is not in the dataset (it has {', '.join(rows.column_names)})")
    ids = [_as_in_column(rows, id_column, value, "forget_ids") for value in job.forget_ids]
    return data.split_by_ids(rows, ids, column=id_column)


def _by_values(rows: Dataset, job: Selection, key: str = "") -> tuple[Dataset, Dataset]:
    column = job.forget_column
    if column not in rows.column_names:
        raise ValueError(
            f"{key}forget_column: {column!r} is not in the dataset (it has {', '.join(rows.column_names)})"
        )
    values = [_as_in_column(rows, column, value, "forget_values") for value in job.forget_values]
    try:
        return data.split_by_values(rows, column, values)
    except ValueError as error:
        raise ValueError(f"{key}{error}") from error


def _without(rows: Dataset, forget: Dataset, id_column: str) -> Dataset | None:
    """The rows that are not in `forget`; None where no ids tell."""
    if not all(id_column in part.column_names for part in (rows, forget)):
        return None
    gone = set(forget[id_column])
    return rows.select([row for row, value in enumerate(rows[id_column]) if value not in gone])


def _as_in_column(rows: Dataset, column: str, word: str, key: str) -> Any:
    """A word of a recipe as the value that the column would hold."""
    feature = rows.features[column]
    names = getattr(feature, "names", None)
    if names is not None:
        if word in names and word.isdecimal() and int(word) < len(names) and names[int(word)] != word:
            raise ValueError(
                f"{key}: {word!r} is the name of class {names.index(word)}, and class {word} is {names[int(word)]!r}; "
                "use forget_dataset to say which"
            )
        if word in names:
            return names.index(word)
    kind = str(getattr(feature, "dtype", ""))
    if kind == "bool":
        known = {"true": True, "false": False}
        if word.lower() in known:
            return known[word.lower()]
    elif "int" in kind or "float" in kind:
        try:
            return int(word) if "int" in kind else float(word)
        except ValueError:
            pass
    else:
        return word
    allowed = f"one of {', '.join(names[:10])}" if names is not None else f"a value of type {kind}"
    raise ValueError(f"{key}: {word!r} does not occur in column {column!r}; expected {allowed}")
