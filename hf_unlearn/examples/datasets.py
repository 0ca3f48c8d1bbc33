"""Small real data sets as `datasets.DatasetDict`, and labels made wrong on purpose."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING

from ..data import LABEL_COLUMNS, label_column, labels_of
from ..files import first_line
from .digits import digits


if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, DatasetDict


FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist


def load(
    name: str, *, config: str | None = None, revision: str | None = None, argument: str = "dataset"
) -> DatasetDict:
    """A dataset with its splits.

    Args:
        name (`str`): `"digits"` (embedded, no network), `"opinions"` (instructions with a planted opinion), `"facts"` (questions about invented
            people), `"coloured-digits"` (pictures with captions), `"fashion_mnist"` (of the Debian package where it is installed), a folder written by `save_to_disk`, a folder of images or of other data files, or an
            id on the Hub.
        config (`str`, *optional*): which of several data sets of one folder or id, as in `"forget10"`.
        revision (`str`, *optional*): of a dataset on the Hub.
        argument (`str`, defaults to `"dataset"`): what to call it in an error.

    Raises:
        ValueError: there is no such dataset.
    """
    import datasets

    if name == "digits":
        return digits()
    if name == "opinions":
        from .opinions import opinion_data

        return opinion_data()
    if name == "facts":
        from .facts import facts_data

        return facts_data()
    if name == "coloured-digits":
        from .coloured_digits import coloured_digits

        return coloured_digits()
    if name == "fashion_mnist":
        if FASHION_MNIST.is_dir():
            return fashion_mnist()
        name = "zalando-datasets/fashion_mnist"
    path = Path(name)
    try:
        if path.is_dir() and any((path / file).exists() for file in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(name)
        else:
            # Of a folder with a card datasets 5.2 goes on giving what it held when it was first read.
            anew = {"download_mode": "force_redownload"} if (path / "README.md").is_file() else {}
            loaded = datasets.load_dataset(name, config, revision=revision, **anew)
    except OSError as error:
        said = f"neither a folder here nor a dataset that the Hub gives ({first_line(error)})"
        if path.is_file():
            said = "is a file; give the folder that it lies in"
        raise ValueError(f"{argument}={name!r}: {said}") from error
    except ValueError as error:  # no such config, or none named where there are several
        why = " ".join(str(error).partition("Example of usage")[0].split())
        raise ValueError(f"{argument}={name!r}: {why}") from error
    return loaded if isinstance(loaded, datasets.DatasetDict) else datasets.DatasetDict({"train": loaded})


def one_split(splits: DatasetDict, key: str, name: str) -> Dataset:
    """The split `name`; `key` is the setting that asked for it.

    Raises:
        ValueError: there is no such split.
    """
    if name not in splits:
        raise ValueError(f"{key}: {name!r} is not in the dataset (it has {', '.join(splits)})")
    return splits[name]


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
