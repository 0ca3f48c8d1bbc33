"""The handwritten digits inside scikit-learn."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import DatasetDict


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
