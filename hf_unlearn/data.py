"""What to forget and what to keep, as datasets: splits, ids, collators, fingerprints."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset as TorchDataset


if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, DatasetDict


LABEL_COLUMNS = ("labels", "label", "label_ids")
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist


# Loading


def load(name: str, *, revision: str | None = None) -> DatasetDict:
    """A dataset with its splits.

    Args:
        name (`str`): `"digits"` (embedded, no network), `"fashion_mnist"` (of the Debian package where it is installed), a
            folder written by `save_to_disk`, a folder of images, or an id on the Hub.
        revision (`str`, *optional*): of a dataset on the Hub.

    Raises:
        ValueError: there is no such dataset.
    """
    import datasets

    if name == "digits":
        return digits()
    if name == "fashion_mnist":
        if FASHION_MNIST.is_dir():
            return fashion_mnist()
        name = "zalando-datasets/fashion_mnist"
    path = Path(name)
    try:
        if path.is_dir() and any((path / file).exists() for file in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(name)
        elif path.is_dir():
            loaded = datasets.load_dataset("imagefolder", data_dir=name)
        else:
            loaded = datasets.load_dataset(name, revision=revision)
    except OSError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"dataset={name!r}: neither a folder here nor a dataset that the Hub gives ({reason})"
        ) from error
    return loaded if isinstance(loaded, datasets.DatasetDict) else datasets.DatasetDict({"train": loaded})


def one_split(splits: DatasetDict, key: str, name: str) -> Dataset:
    """The split `name`; `key` is the setting that asked for it.

    Raises:
        ValueError: there is no such split.
    """
    if name not in splits:
        raise ValueError(f"{key}: {name!r} is not in the dataset (it has {', '.join(splits)})")
    return splits[name]


def digits() -> DatasetDict:
    """The 1,797 real handwritten digits inside scikit-learn: 8 × 8 grey images, ten classes.

    Returns:
        `DatasetDict`: `train` (1,077), `validation` (270) and `test` (450), stratified and always the same, with columns
        `id` (the row in scikit-learn's array), `image` and `label`.
    """
    import numpy as np
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
    from PIL import Image as PILImage
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    pixels = (source.images * (255 / 16)).round().astype(np.uint8)
    rest, test = train_test_split(np.arange(len(pixels)), test_size=0.25, random_state=0, stratify=source.target)
    train, validation = train_test_split(rest, test_size=0.2, random_state=0, stratify=source.target[rest])
    features = Features(
        {"id": Value("int64"), "image": Image(), "label": ClassLabel(names=[str(c) for c in range(10)])}
    )
    return DatasetDict(
        {
            name: Dataset.from_dict(
                {
                    "id": rows,
                    "image": [PILImage.fromarray(pixels[row]) for row in rows],
                    "label": source.target[rows],
                },
                features=features,
            )
            for name, rows in (("train", train), ("validation", validation), ("test", test))
        }
    )


def fashion_mnist() -> DatasetDict:
    """Fashion-MNIST from Debian's package `dataset-fashion-mnist`: 28 × 28 grey images of ten kinds of clothes.

    Returns:
        `DatasetDict`: `train` (60,000) and `test` (10,000) with columns `image` and `label`, as the Hub's.
    """
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
    from PIL import Image as PILImage

    names = [
        "T - shirt / top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {
                    "image": [PILImage.fromarray(image) for image in read_idx(f"{prefix}-images-idx3-ubyte.gz")],
                    "label": read_idx(f"{prefix}-labels-idx1-ubyte.gz"),
                },
                features=features,
            )
            for split, prefix in (("train", "train"), ("test", "t10k"))
        }
    )


def read_idx(name: str) -> np.ndarray:
    """An array of Fashion-MNIST in the IDX format of the MNIST family: magic number, shape (big-endian), bytes."""
    import numpy as np

    with gzip.open(FASHION_MNIST / name) as file:
        dimensions = file.read(4)[3]
        shape = np.frombuffer(file.read(4 * dimensions), ">u4")
        return np.frombuffer(file.read(), np.uint8).reshape(shape)


def with_wrong_labels(dataset: Dataset, share: float, *, seed: int = 0) -> Dataset:
    """A copy in which a share of the labels is wrong, each one of the other classes at random.

    Args:
        dataset (`Dataset`): with a label column; classes are those of its `ClassLabel`, or the values that occur.
        share (`float`): of the rows, from 0 to 1.
        seed (`int`): which rows, and which labels.

    Returns:
        `Dataset`: with a column `wrong` (`bool`) beside.

    Raises:
        ValueError: no label column, a single class, a share out of its range, or a column `wrong` already.
    """
    import numpy as np

    column = label_column(dataset)
    if column is None:
        raise ValueError(f"wrong_labels: the dataset has no label column; name it one of {', '.join(LABEL_COLUMNS)}")
    if "wrong" in dataset.column_names:
        raise ValueError("wrong_labels: the dataset has a column 'wrong' already; rename it")
    feature, labels = dataset.features[column], np.array(labels_of(dataset))
    classes = np.arange(len(feature.names)) if hasattr(feature, "names") else np.unique(labels)
    if not 0 <= share <= 1:
        raise ValueError(f"wrong_labels: {share} is not a share from 0 to 1")
    if len(classes) < 2:
        raise ValueError(f"wrong_labels: column {column!r} has one class, so no label can be wrong")
    random = np.random.default_rng(seed)
    rows = random.choice(len(labels), round(share * len(labels)), replace=False)
    places = np.searchsorted(classes, labels[rows])
    labels[rows] = classes[(places + random.integers(1, len(classes), len(rows))) % len(classes)]
    wrong = np.zeros(len(labels), dtype=bool)
    wrong[rows] = True
    plain = dataset.with_format(None).add_column("wrong", wrong.tolist()).remove_columns(column)
    plain = plain.add_column(column, labels.tolist(), feature=feature).select_columns([*dataset.column_names, "wrong"])
    return plain.with_format(dataset.format["type"], **dataset.format["format_kwargs"])


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


# Batches


class ForgetRetainDataset(TorchDataset):
    """Forget examples, each beside a retain example that changes from epoch to epoch: `{"forget": row, "retain": row}`.

    Length and order are the forget set's. The pairing is a function of seed and epoch alone, so a resumed run sees the
    same pairs.
    """

    def __init__(self, forget: TorchDataset, retain: TorchDataset | None = None, *, seed: int = 0):
        self.forget, self.retain, self.seed = forget, retain, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        if self.retain is not None:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            rounds = -(-len(self.forget) // len(self.retain))
            self.partner = torch.cat(
                [torch.randperm(len(self.retain), generator=generator) for _ in range(rounds)]
            ).tolist()

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, row: int) -> dict[str, Any]:
        item = {"forget": self.forget[row]}
        if self.retain is not None:
            item["retain"] = self.retain[self.partner[row]]
        return item


class NestedCollator:
    """Collates `{"forget": row, "retain": row}` part by part with the collator it wraps; flat rows pass straight through."""

    def __init__(self, collator: Callable[[list[Any]], Any]):
        self.collator = collator

    def __getattr__(self, name: str) -> Any:  # a Trainer looks for the collator's tokenizer when it saves
        if name == "collator":
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, rows: list[Any]) -> Any:
        if isinstance(rows[0], dict) and "forget" in rows[0]:
            return {part: self.collator([row[part] for row in rows]) for part in rows[0]}
        return self.collator(rows)


class RawCollator:
    """Turns rows of raw images or texts and labels into model inputs with the model's own processor.

    Args:
        processor: image processor, or tokenizer.
        column (`str`): `"image"` or `"text"`.
        max_length (`int`, *optional*): texts are cut to this many tokens.
    """

    def __init__(self, processor: Any, column: str, *, max_length: int | None = None):
        self.processor, self.column, self.max_length = processor, column, max_length

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        values = [row[self.column] for row in rows]
        if self.column == "image":
            batch = dict(self.processor(images=values, return_tensors="pt"))
        else:
            limit = {"truncation": True, "max_length": self.max_length}
            batch = dict(self.processor(values, padding=True, return_tensors="pt", **limit))
        label = next((name for name in LABEL_COLUMNS if name in rows[0]), None)
        if label is not None:
            batch["labels"] = torch.tensor([int(row[label]) for row in rows])
        return batch


def raw_collator(dataset: Any, processing_class: Any) -> RawCollator | None:
    """A collator for rows of raw images or texts; None where the rows are model inputs already.

    Raises:
        ValueError: raw rows, and nothing to process them with.
    """
    columns = (
        dataset[0].keys() if isinstance(dataset[0], dict) else ()
    )  # as a transform leaves them, unlike column_names
    if any(column in columns for column in ("pixel_values", "input_ids")):
        return None
    column = next((column for column in ("image", "text") if column in columns), None)
    if column is None:
        return None
    if processing_class is None:
        kind = "image processor" if column == "image" else "tokenizer"
        raise ValueError(f"processing_class: the dataset holds raw {column}s; pass the model's {kind}")
    from transformers import PreTrainedTokenizerBase

    limit = processing_class.model_max_length if isinstance(processing_class, PreTrainedTokenizerBase) else None
    return RawCollator(processing_class, column, max_length=limit if limit and limit < 10**9 else None)


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
