"""Which images show what is undesired: by numbers on a sheet of samples, by a classifier's classes, by folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import data
from ..examples.datasets import load, one_split
from ..plots import image_grid


if TYPE_CHECKING:
    from datasets import Dataset

    from ..metrics.features import ClassifierFeatures


SHEET = "samples_to_mark.png"
PAGE = 200  # samples on one
COLUMNS = 10  # of the sheet, so that numbers are easily found
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp")


def write_sheet(samples: Tensor, folder: Path) -> list[Path]:
    """Numbered samples, 200 a page.

    Args:
        samples (`Tensor`): `[n, channels, height, width]` in [−1, 1], or bytes.
        folder (`Path`): gets [`SHEET`], and where there are more of them pages `samples_to_mark_2.png` and so on.
    """
    for old in folder.glob(f"{Path(SHEET).stem}*.png"):
        old.unlink()
    pages = []
    for page, first in enumerate(range(0, len(samples), PAGE)):
        part = samples[first : first + PAGE].permute(0, 2, 3, 1)
        images = (part if part.dtype == torch.uint8 else (part + 1) / 2).numpy()
        captions = [str(first + number) for number in range(len(images))]
        file = folder / (SHEET if not page else f"{Path(SHEET).stem}_{page + 1}.png")
        image_grid(images, captions, file, columns=COLUMNS)
        pages.append(file)
    return pages


def where_the_sheet_is(pages: Sequence[Path], count: int) -> str:
    """The beginning of a sentence for the user."""
    last = f" to {pages[-1].name}" if len(pages) > 1 else ""
    return f"{count} samples are in {pages[0]}{last}"


# Classes


def class_numbers(
    words: Sequence[str] | None, classifier: ClassifierFeatures, *, key: str, argument: str, name: str | None
) -> list[int]:
    """Names or numbers of classes as a classifier numbers them.

    Args:
        words (`list[str]`, *optional*): the value of the key `key`.
        classifier ([`ClassifierFeatures`]): the value of the key `argument`, which is `name`.

    Raises:
        ValueError: a word that is no class, or may be two.
    """
    names = {int(index): str(label) for index, label in classifier.model.config.id2label.items()}
    found = set()
    for word in words or ():
        meant = {index for index, label in names.items() if word in (label, str(index))}
        if len(meant) != 1:
            known = ", ".join(
                str(index) if label == str(index) else f"{index}: {label}" for index, label in names.items()
            )
            wrong = "may be two classes" if meant else "is no class"
            raise ValueError(f"{key}: {word!r} {wrong} of {argument}={name!r}; choose among {known}")
        found |= meant
    return sorted(found)


def other_real_images(dataset: str | None, revision: str | None, split: str | None, left_out: list[int]) -> Dataset:
    """The rows of `eval_split` that are of no class that is left out.

    Raises:
        ValueError: no such dataset or split, or no labels that are numbers.
    """
    rows = one_split(load(dataset, revision=revision), "eval_split", split)
    if data.label_column(rows) is None:
        raise ValueError(
            "eval_split: has no labels, so which images are of other classes is not known; name the column one of "
            f"{', '.join(data.LABEL_COLUMNS)}"
        )
    labels = data.labels_of(rows)
    if odd := [label for label in labels if not isinstance(label, int)]:
        raise ValueError(
            f"eval_split: has the label {odd[0]!r}; make it the number that the classifier gives the class"
        )
    return rows.select([row for row, label in enumerate(labels) if label not in left_out])


# Folders


def is_saved_dataset(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))


def saved_dataset(folder: str, argument: str) -> Dataset:
    """The rows that `save_to_disk` wrote.

    Raises:
        ValueError: no such folder, or one with several splits.
    """
    if not is_saved_dataset(Path(folder)):
        raise ValueError(f"{argument}: {folder!r} is no dataset saved with save_to_disk")
    saved = load(folder)
    if len(saved) > 1:
        raise ValueError(f"{argument}: {folder!r} has the splits {', '.join(saved)}; save one of them alone")
    return next(iter(saved.values()))


def images_in(folder: str, argument: str) -> Dataset | list[Any]:
    """PIL images of the files in a folder, by name; or the rows that `save_to_disk` wrote.

    Raises:
        ValueError: no such folder, no images in it, or one that cannot be read.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{argument}: {folder!r} is no folder; give one with image files, or written by save_to_disk")
    if is_saved_dataset(path):
        return saved_dataset(folder, argument)
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_FILES and file.is_file())
    if not files:
        raise ValueError(f"{argument}: {folder!r} holds no images ({', '.join(IMAGE_FILES)}) and no dataset")
    return [read_image(file, argument) for file in files]


def read_image(file: Path, argument: str) -> Any:
    """A PIL image.

    Raises:
        ValueError: the file holds none.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
            return image.copy()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{argument}: {str(file)!r} cannot be read as an image; remove it") from error
