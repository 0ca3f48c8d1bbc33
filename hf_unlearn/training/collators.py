"""From rows to batches: forget beside retain, raw images and texts, row numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset as TorchDataset

from ..data import LABEL_COLUMNS


ALTERNATE = "alternate"  # of a forget row: the answer that is wanted instead, as a row of its own


class ForgetRetainDataset(TorchDataset):
    """Forget examples, each beside retain examples that change from epoch to epoch: `{"forget": row, "retain": row}`.

    Length and order are the forget set's. The pairing is a function of seed and epoch alone, so a resumed run sees the
    same pairs. With `each` above 1, `"retain"` is a list of so many rows.
    """

    def __init__(self, forget: TorchDataset, retain: TorchDataset | None = None, *, each: int = 1, seed: int = 0):
        self.forget, self.retain, self.each, self.seed = forget, retain, each, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        if self.retain is not None:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            rounds = -(-len(self.forget) * self.each // len(self.retain))
            self.partner = torch.cat(
                [torch.randperm(len(self.retain), generator=generator) for _ in range(rounds)]
            ).tolist()

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, row: int) -> dict[str, Any]:
        item = {"forget": self.forget[row]}
        if self.retain is not None:
            partners = [self.retain[one] for one in self.partner[row * self.each : (row + 1) * self.each]]
            item["retain"] = partners if self.each > 1 else partners[0]
        return item


class NestedCollator:
    """Collates `{"forget": row, "retain": row}` part by part with the collator it wraps, lists of rows and rows with their number as
    well, and what stands under `alternate` in forget rows as a part of theirs; flat rows pass straight through, without it.
    """

    def __init__(self, collator: Callable[[list[Any]], Any]):
        self.collator = collator

    def __getattr__(self, name: str) -> Any:  # a Trainer looks for the collator's tokenizer when it saves
        if name == "collator":
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, rows: list[Any]) -> Any:
        if not (isinstance(rows[0], dict) and "forget" in rows[0]):
            return self._collated(rows)
        batch = {part: self._collated([row[part] for row in rows]) for part in rows[0]}
        forget = [row["forget"] for row in rows]
        if isinstance(forget[0], dict) and isinstance(forget[0].get(ALTERNATE), dict):
            batch["forget"][ALTERNATE] = self.collator([row[ALTERNATE] for row in forget])
        return batch

    def _collated(self, rows: list[Any]) -> Any:
        if isinstance(rows[0], list):
            rows = [one for some in rows for one in some]
        if isinstance(rows[0], dict) and ALTERNATE in rows[0]:
            rows = [{name: value for name, value in row.items() if name != ALTERNATE} for row in rows]
        return (RowCollator(self.collator) if isinstance(rows[0], tuple) else self.collator)(rows)


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
    """A collator for rows of raw images or texts; None where the rows are model inputs already, or there are none.

    Raises:
        ValueError: raw rows, and nothing to process them with.
    """
    if dataset is None:
        return None
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


ROW = "sample_index"  # in a batch: which rows of the training set it was made of


class WithRow(TorchDataset):
    """A dataset whose rows come with their number."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> tuple[int, Any]:
        return row, self.dataset[row]

    def __getitems__(self, rows: list[int]) -> list[tuple[int, Any]]:  # a `Dataset` reads a batch in one go
        at_once = getattr(self.dataset, "__getitems__", None)
        return list(zip(rows, at_once(rows) if at_once else map(self.dataset.__getitem__, rows), strict=True))


class RowCollator:
    """Collates the rows, and their numbers beside them."""

    def __init__(self, collator: Callable):
        self.collator = collator

    def __call__(self, rows: list[tuple[int, Any]]) -> dict[str, Any]:
        numbers, rows = zip(*rows, strict=True)
        return {**self.collator(list(rows)), ROW: torch.tensor(numbers)}
