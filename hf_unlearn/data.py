"""What to forget and what to keep, as datasets: splits, ids, collators, fingerprints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset as TorchDataset


if TYPE_CHECKING:
    from datasets import Dataset


LABEL_COLUMNS = ("labels", "label", "label_ids")


# Splitting


def split_by_values(dataset: Dataset, column: str, values: Sequence[Any]) -> tuple[Dataset, Dataset]:
    """`(forget, retain)`: the rows whose `column` is one of `values`, and the others, in their order.

    Class names are understood where the column is a `ClassLabel`.

    Raises:
        ValueError: no such column, or a value that does not occur in it.
    """
    if isinstance(values, str):
        raise ValueError(f"forget_values={values!r}: is one text; pass a list of values")
    present = _column(dataset, column)
    feature = dataset.features.get(column)
    names = getattr(feature, "names", None) or []
    wanted = {names.index(value) if isinstance(value, str) and value in names else value for value in values}
    missing = sorted(wanted - set(present), key=str)
    if missing:
        some = ", ".join(str(value) for value in sorted(set(present), key=str)[:10])
        raise ValueError(f"forget_values: {missing[0]!r} does not occur in column {column!r} (it has {some})")
    inside = [value in wanted for value in present]
    return (
        dataset.select([row for row, hit in enumerate(inside) if hit]),
        dataset.select([row for row, hit in enumerate(inside) if not hit]),
    )


def split_by_ids(dataset: Dataset, ids: Iterable[Any], *, column: str = "id") -> tuple[Dataset, Dataset]:
    """`(forget, retain)`: the rows whose id is in `ids`, and the others.

    Raises:
        ValueError: no such column, or an id that is not there.
    """
    present = _column(dataset, column)
    wanted = set(ids)
    missing = sorted(wanted - set(present), key=str)
    if missing:
        raise ValueError(f"forget_ids: {missing[0]!r} is not in column {column!r} ({len(missing)} unknown in all)")
    inside = [value in wanted for value in present]
    return (
        dataset.select([row for row, hit in enumerate(inside) if hit]),
        dataset.select([row for row, hit in enumerate(inside) if not hit]),
    )


def _column(dataset: Dataset, column: str) -> list[Any]:
    if column not in dataset.column_names:
        raise ValueError(f"column {column!r} is not in the dataset (it has {', '.join(dataset.column_names)})")
    return dataset.with_format(None)[column][:]


def label_column(dataset: TorchDataset | Dataset) -> str | None:
    """The name under which a dataset's rows carry their label, or None."""
    names = dataset[0].keys() if len(dataset) and isinstance(dataset[0], dict) else ()
    return next((name for name in LABEL_COLUMNS if name in names), None)


def labels_of(dataset: TorchDataset | Dataset) -> list[int]:
    """All labels, without decoding what else is in the rows where that can be avoided."""
    column = label_column(dataset)
    if column in (getattr(dataset, "column_names", None) or ()):
        return dataset.with_format(None)[column][:]
    return [int(dataset[row][column]) for row in range(len(dataset))]


def overlap(forget: Dataset, retain: Dataset, column: str) -> list[Any]:
    """Ids that occur in both datasets; empty where one of them has no such column."""
    if not all(column in (getattr(dataset, "column_names", None) or ()) for dataset in (forget, retain)):
        return []
    return sorted(set(_column(forget, column)) & set(_column(retain, column)), key=str)


def check_marks(undesired: Any, clean: Any, argument: str = "undesired, clean") -> None:
    """Refuse samples that are marked both ways, in arrays `[n, …]` and `[m, …]` of one kind; they are compared bit by bit.

    Raises:
        ValueError: naming `argument` and how many.
    """
    both = {row.tobytes() for row in undesired} & {row.tobytes() for row in clean}
    if both:
        raise ValueError(f"{argument}: {len(both)} samples are marked both undesired and clean; keep one of the marks")


# Fingerprints


def fingerprint(dataset: Iterable[dict[str, Any]], key: bytes) -> str:
    """Keyed digest of a dataset's content, which proves to a holder of `key` what was forgotten and tells others nothing.

    The order of rows does not matter. Without a key a digest of guessable rows could be searched for; with one it cannot.

    Args:
        dataset: rows; images, arrays, tensors and JSON values are understood.
        key (`bytes`): at most 64 bytes, kept private.

    Returns:
        `str`: 64 hexadecimal digits.

    Raises:
        ValueError: an empty key, or a value of another kind.
    """
    if not key:
        raise ValueError("key: must not be empty; without one the digest of guessable rows can be searched for")
    rows = sorted(_digest(row, key) for row in dataset)
    return hashlib.blake2b(b"".join(rows), key=key, digest_size=32).hexdigest()


def _digest(value: Any, key: bytes) -> bytes:
    """Digest of one value and its kind; containers are digests of digests, so no bytes can move between their parts."""
    if isinstance(value, dict):
        parts = [b"dict"] + [_digest(part, key) for name in sorted(value) for part in (name, value[name])]
    elif isinstance(value, (list, tuple)):
        parts = [b"list", *(_digest(part, key) for part in value)]
    elif isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        parts = [b"tensor", f"{tuple(value.shape)}{value.dtype}".encode(), content]
    elif hasattr(value, "dtype") and hasattr(value, "tobytes"):
        parts = [b"array", f"{value.shape}{value.dtype}".encode(), value.tobytes()]
    elif hasattr(value, "getpalette"):
        parts = [b"image", f"{value.size}{value.mode}".encode(), value.tobytes(), bytes(value.getpalette() or ())]
    elif isinstance(value, bytes):
        parts = [b"bytes", value]
    elif value is None or isinstance(value, (bool, int, float, str)):
        parts = [b"json", json.dumps(value).encode()]
    elif hasattr(value, "isoformat"):
        parts = [type(value).__name__.encode(), value.isoformat().encode()]
    else:
        raise ValueError(f"dataset: a fingerprint of {type(value).__name__} values is not defined")
    digest = hashlib.blake2b(key=key, digest_size=32)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()
