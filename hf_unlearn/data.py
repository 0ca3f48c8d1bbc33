"""What to forget and what to keep, as datasets: splits, ids, collators, fingerprints."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Subset


if TYPE_CHECKING:
    from datasets import Dataset


LABEL_COLUMNS = ("labels", "label", "label_ids")
LOOKED_AT = 64  # rows of a dataset, to recognise it
# Columns that say what an example is; others may tell its number or where it comes from.
CONTENT = (
    "image", "images", "img", "pixel_values", "latents", "text", "input_ids", "inputs_embeds", "messages", "conversations",
    "prompt", "completion", "question", "answer", "instruction", "input", "output", "query", "response",
)  # fmt: skip


# Splitting


def split_by_values(dataset: Dataset, column: str, values: Sequence[Any]) -> tuple[Dataset, Dataset]:
    """`(forget, retain)`: the rows whose `column` is one of `values`, and the others, in their order.

    Class names are understood where the column is a `ClassLabel`.

    Raises:
        ValueError: no such column, or a value that does not occur in it.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        what = "is one text" if isinstance(values, str) else "is no list"
        raise ValueError(f"forget_values={values!r}: {what}; pass a list of values, as in [{values!r}]")
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
    if isinstance(dataset, Mapping):
        raise ValueError(f"dataset: has splits {', '.join(map(str, dataset))}; pass one of them")
    if column not in dataset.column_names:
        raise ValueError(f"column {column!r} is not in the dataset (it has {', '.join(dataset.column_names)})")
    return dataset.with_format(None)[column][:]


def value_name(value: Any, feature: Any) -> str:
    """What a value of a column is called: by its class, if it has one (a `ClassLabel` of −1 is none)."""
    names = getattr(feature, "names", None)
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else str(value)


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


def class_names(dataset: TorchDataset | Dataset, limit: int = 10) -> str | None:
    """As in `"class 3"` or `"classes cat, dog"`: what the labels of a dataset are called; None without labels, or with more
    than `limit`.
    """
    column = label_column(dataset)
    if column is None:
        return None
    labels = list(dict.fromkeys(labels_of(dataset)))
    named = getattr(getattr(dataset, "features", {}).get(column), "int2str", None)  # of a ClassLabel
    if named is not None:
        labels = [named(label) if isinstance(label, int) else label for label in labels]
    if not labels or len(labels) > limit or not all(isinstance(label, int | str) for label in labels):
        return None
    return in_words(labels)


def in_words(classes: Sequence[Any]) -> str:
    """As in `"class 3"` or `"classes cat, dog"`."""
    return ("class " if len(classes) == 1 else "classes ") + ", ".join(map(str, classes))


def overlap(forget: Any, other: Any, column: str) -> str | None:
    """What two datasets have in common, as in `"2 of its ids are in forget_dataset too (first: 'b' in column 'id')"`; None where
    nothing.

    By the ids in `column` where both have it. Numbers are row numbers as often as ids, and two splits both begin at 0: rows with
    one number must also have the same content. Where there are no ids, or one set's are 0…n−1, rows are compared by content (the
    columns of [`CONTENT`], else all, and the label) as it is stored: images by their bytes. Parts of one torch dataset are compared by their
    places in it. Other datasets that are no `datasets.Dataset`, or that have other columns of content, are not compared.

    Args:
        forget, other (`Dataset`): what is to be forgotten, and what must not hold it.
        column (`str`): of the ids.
    """
    if (shared := _shared_places(forget, other)) is not None:
        return f"{shared} of its rows are in forget_dataset too" if shared else None
    names = [set(getattr(dataset, "column_names", None) or ()) for dataset in (forget, other)]
    contents = [here & set(CONTENT) or here - {column, *LABEL_COLUMNS} for here in names]
    common = sorted(contents[0]) if contents[0] == contents[1] else []
    if column in names[0] & names[1]:
        ids = [_column(dataset, column) for dataset in (forget, other)]
        if not common or not any(map(_is_numbering, ids)):
            shared = sorted(set(ids[0]) & set(ids[1]), key=str)
            if shared and common and all(map(_is_number, shared)):
                rows = {value: row for row, value in enumerate(ids[0])}
                other_rows = {value: row for row, value in enumerate(ids[1])}
                found = [
                    _contents(dataset.select([of[value] for value in shared]), common)
                    for dataset, of in ((forget, rows), (other, other_rows))
                ]
                shared = [value for value, one, two in zip(shared, *found, strict=True) if one == two]
            if not shared:
                return None
            return f"{len(shared)} of its ids are in forget_dataset too (first: {shared[0]!r} in column {column!r})"
    if not common:
        return None
    common += sorted(
        names[0] & names[1] & set(LABEL_COLUMNS)
    )  # to be told another label is another thing than to be kept
    known = set(_contents(forget, common))
    found = [row for row, content in enumerate(_contents(other, common)) if content in known]
    return f"{len(found)} of its rows are in forget_dataset too (first: row {found[0]})" if found else None


def _shared_places(forget: Any, other: Any) -> int | None:
    """How many rows two parts of one torch dataset (`Subset`, or the whole) have in common; None for other kinds."""
    parts = []
    for dataset in (forget, other):
        places = range(len(dataset))
        while isinstance(dataset, Subset):
            dataset, places = dataset.dataset, [int(dataset.indices[place]) for place in places]
        parts.append((dataset, places))
    (one, these), (two, those) = parts
    if one is not two or hasattr(one, "column_names"):
        return None
    return len(set(these) & set(those))


def _is_number(value: Any) -> bool:
    return type(value) is int or (isinstance(value, str) and value.isdecimal())


def _is_numbering(ids: Sequence[Any]) -> bool:
    """Whether they are numbers without a gap, wherever they begin."""
    if not all(map(_is_number, ids)):
        return False
    numbers = sorted(map(int, ids)) or [0]
    return len(ids) == 0 or numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def _contents(dataset: Dataset, columns: Sequence[str]) -> Iterator[bytes]:
    """A digest of each row as it is stored, nothing decoded."""
    for table in dataset.select_columns(columns).with_format("arrow").iter(256):
        parts = [table.column(name).combine_chunks() for name in columns]
        for row in range(table.num_rows):
            digest = hashlib.blake2b(digest_size=16)
            for part in parts:
                content = _stored(part[row])
                digest.update(len(content).to_bytes(8, "little") + content)
            yield digest.digest()


def _stored(scalar: Any) -> bytes:
    """The bytes of an Arrow value; of an image those of its file, of nested lists their shape at the top and their numbers."""
    if not scalar.is_valid:
        return b"none"
    value = getattr(scalar, "value", scalar)  # of an extension type, as arrays of two dimensions are
    if hasattr(value, "values") and not hasattr(value, "keys"):
        values = value.values
        while hasattr(values.type, "value_type") and hasattr(values, "flatten"):
            values = values.flatten()
        if not values.null_count and values.type.num_fields == 0:
            numbers = values.to_numpy(zero_copy_only=False)
            if numbers.dtype.kind in "biuf":
                return str(len(value.values)).encode() + numbers.tobytes()
    content = value.as_py() if hasattr(value, "as_py") else value
    if isinstance(content, dict) and content.get("bytes"):  # an image or a sound, wherever it came from
        return content["bytes"]
    return repr(content).encode()


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
    numbers = _Numbers(key)
    rows = sorted(_digest(row, key, numbers) for row in dataset)
    return hashlib.blake2b(b"".join(rows), key=key, digest_size=32).hexdigest()


class _Numbers(dict):
    """Digests of numbers by what they are in JSON: of those of a picture most occur again."""

    def __init__(self, key: bytes):
        self.key = key

    def __missing__(self, text: str) -> bytes:
        if len(self) >= 2**16:
            self.clear()
        self[text] = _joined([b"json", text.encode()], self.key)
        return self[text]


def _digest(value: Any, key: bytes, numbers: _Numbers | None = None) -> bytes:
    """Digest of one value and its kind; containers are digests of digests, so no bytes can move between their parts."""
    numbers = _Numbers(key) if numbers is None else numbers
    if isinstance(value, dict):
        parts = [b"dict"] + [_digest(part, key, numbers) for name in sorted(value) for part in (name, value[name])]
    elif isinstance(value, (list, tuple)):
        if value and set(map(type, value)) <= {int, float}:
            parts = [b"list", *(numbers[text] for text in json.dumps(value)[1:-1].split(", "))]
        else:
            parts = [b"list", *(_digest(part, key, numbers) for part in value)]
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
    return _joined(parts, key)


def _joined(parts: Iterable[bytes], key: bytes) -> bytes:
    digest = hashlib.blake2b(key=key, digest_size=32)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def example_digest(example: Any, key: bytes, salt: bytes) -> str:
    """Keyed digest of the content of one example (the columns of [`CONTENT`] where a row has some, else all of it): HMAC-SHA-256, of which
    128 bits are kept.

    Args:
        example: a row, of the kinds that [`fingerprint`] knows.
        key (`bytes`): see there.
        salt (`bytes`): of one set of examples, public: the digests of two sets have nothing in common, whatever the sets have.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    if isinstance(example, Mapping):
        names = [name for name in example if name in CONTENT] or list(example)
        example = {name: example[name] for name in names}
    return hmac.new(key, salt + _digest(example, key), hashlib.sha256).hexdigest()[:32]


def example_digests(dataset: Iterable[Any], key: bytes, salt: bytes) -> list[str]:
    """[`example_digest`] of each row, sorted, as many as there are rows: in place of one that occurs again is a random one, so that
    nothing is to be seen but the number.
    """
    found = [example_digest(row, key, salt) for row in dataset]
    once = set(found)
    return sorted(once | {secrets.token_hex(16) for _ in range(len(found) - len(once))})


def looks_of(dataset: Any, key: str) -> str | None:
    """Fingerprint of up to 64 rows from all over a `Dataset`, before any transform, or a tensor; None for other kinds, and for rows
    that have none.
    """
    if not hasattr(dataset, "with_format") and not isinstance(dataset, torch.Tensor):
        return None
    places = range(0, len(dataset), -(-len(dataset) // LOOKED_AT))
    try:
        rows = dataset[list(places)] if isinstance(dataset, torch.Tensor) else dataset.with_format(None).select(places)
        return fingerprint(
            ({"row": place, "values": row} for place, row in zip(places, rows, strict=True)), key.encode()
        )
    except Exception:
        # A value of a kind that has no fingerprint, or one that cannot be decoded and that training may not need.
        return None
