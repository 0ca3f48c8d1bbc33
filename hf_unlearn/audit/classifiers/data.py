"""The rows of an audit of classifiers, as tensors: forget, retain, and unseen rows of the forgotten classes and of the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator

from ...data import class_names, in_words, label_column, labels_of, overlap
from ...modes import seeded_generator
from ...training.collators import raw_collator
from ..digests import digest_of_tensors


EXAMPLES = {"standard": 2000, "quick": 500}  # at most so many rows of a part
BYTES = 2**28  # that the inputs of a part may take
BATCH = 128


@dataclass(frozen=True)
class Part:
    """Rows that are looked at: model inputs `[n, …]` by name, and labels `[n]`."""

    inputs: Mapping[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Tensor | Sequence[int]) -> Part:
        rows = torch.as_tensor(rows, dtype=torch.long)
        return Part({name: value[rows] for name, value in self.inputs.items()}, self.labels[rows])

    def batches(self, device: torch.device | str, size: int = BATCH) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for begin in range(0, len(self), size):
            rows = slice(begin, begin + size)
            yield {name: value[rows].to(device) for name, value in self.inputs.items()}, self.labels[rows].to(device)

    def shuffled(self, seed: int, *key: int) -> Part:
        return self.select(torch.randperm(len(self), generator=seeded_generator("cpu", seed, *key)))

    def __add__(self, other: Part) -> Part:
        """Both, one after the other; texts are filled up with zeros, which no mask counts."""
        inputs = {}
        for name, value in self.inputs.items():
            both = value, other.inputs[name]
            if value.dim() == 2 and not value.is_floating_point():
                length = max(one.shape[1] for one in both)
                both = tuple(torch.nn.functional.pad(one, (0, length - one.shape[1])) for one in both)
            inputs[name] = torch.cat(both)
        return Part(inputs, torch.cat([self.labels, other.labels]))


@dataclass(frozen=True)
class ClassifierData:
    """The rows of an audit.

    Attributes:
        forget, retain ([`Part`]): rows that the original was trained on: those to be forgotten, and others.
        test_forget ([`Part`]): unseen rows of the forgotten classes; empty where single examples were to be forgotten.
        test_retain ([`Part`]): unseen rows of the others.
        classes (`tuple[int, ...]`): the forgotten classes; empty where single examples were to be forgotten.
        num_labels (`int`): of the models.
        forgotten (`str`): in words.
        trials (`Trials`, *optional*): of the way to unlearn, on shadow models.
        no_trials (`str`): why there are none.
    """

    forget: Part
    retain: Part
    test_forget: Part
    test_retain: Part
    classes: tuple[int, ...]
    num_labels: int
    forgotten: str
    trials: Any = None
    no_trials: str = "needs the way to unlearn (unlearn_fn=)"

    @property
    def chance_loss(self) -> float:
        """Of who gives all classes alike, nats."""
        return math.log(self.num_labels)

    def half(self, seed: int, *key: int) -> ClassifierData:
        """The same with a random half of the rows of each part."""
        parts = {
            name: part.shuffled(seed, number, *key).select(range((len(part) + 1) // 2))
            for number, (name, part) in enumerate(self.parts.items())
        }
        return replace(self, **parts, trials=None)

    @property
    def parts(self) -> dict[str, Part]:
        return {name: getattr(self, name) for name in ("forget", "retain", "test_forget", "test_retain")}

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(part) for name, part in self.parts.items()}

    @cached_property
    def digest(self) -> str:
        return digest_of_tensors(
            (f"{name}.{key}", value)
            for name, part in self.parts.items()
            for key, value in (*part.inputs.items(), ("labels", part.labels))
        )

    @cached_property
    def is_forgotten(self) -> Tensor:
        """`[num_labels]`, bool."""
        mask = torch.zeros(self.num_labels, dtype=torch.bool)
        mask[list(self.classes)] = True
        return mask


def classifier_data(
    forget: Any, retain: Any, test: Any, *, num_labels: int, processing_class: Any, size: str, seed: int
) -> ClassifierData:
    """Read the rows of an audit, at most [`EXAMPLES`] of a part, drawn by the seed.

    Classes are forgotten where no retained row has the label of a forget row; else single examples are.

    Raises:
        ValueError: a set that is missing, empty, without labels or with labels that the model does not have, or that shares rows with
            the forget set.
    """
    sets = {"forget": forget, "retain": retain, "test": test}
    for name, rows in sets.items():
        if rows is None or not len(rows):
            raise ValueError(
                f"{name}: {'missing' if rows is None else 'is empty'}; an audit of a classifier needs forget=, retain= and test="
            )
        if label_column(rows) is None:
            raise ValueError(f"{name}: its rows have no label; name that column 'label'")
    for name in ("retain", "test"):
        if shared := overlap(forget, sets[name], "id"):
            raise ValueError(f"{name}: {shared.replace('forget_dataset', 'forget')}; take them out")
    labels = {name: torch.tensor([int(one) for one in labels_of(rows)]) for name, rows in sets.items()}
    for name, values in labels.items():
        if not 0 <= int(values.min()) <= int(values.max()) < num_labels:
            raise ValueError(f"{name}: has label {int(values.max())}, but the model has {num_labels} classes")
    asked = set(labels["forget"].tolist())
    classes = () if asked & set(labels["retain"].tolist()) else tuple(sorted(asked))
    inside = torch.isin(labels["test"], torch.tensor(classes, dtype=torch.long))

    def part(name: str, rows: Tensor, key: int) -> Part:
        dataset = sets[name]
        limit = _limit(dataset, processing_class, EXAMPLES[size])
        drawn = rows[torch.randperm(len(rows), generator=seeded_generator("cpu", seed, key))[:limit]]
        return read_part(dataset, drawn.sort().values.tolist(), processing_class)

    every = {name: torch.arange(len(values)) for name, values in labels.items()}
    words = (class_names(forget) or in_words(classes)) if classes else f"{len(forget)} examples"
    return ClassifierData(
        part("forget", every["forget"], 0),
        part("retain", every["retain"], 1),
        part("test", every["test"][inside], 2),
        part("test", every["test"][~inside], 3),
        classes,
        num_labels,
        words,
    )


def _limit(dataset: Any, processing_class: Any, examples: int) -> int:
    one = read_part(dataset, [0], processing_class)
    return max(
        1, min(examples, BYTES // max(1, sum(value.numel() * value.element_size() for value in one.inputs.values())))
    )


def read_part(dataset: Any, rows: Sequence[int], processing_class: Any) -> Part:
    """Rows as the trainers' collators make inputs of them; of none, an empty part with the inputs of the first row."""
    collator = raw_collator(dataset, processing_class)
    if collator is None:
        text = isinstance(processing_class, PreTrainedTokenizerBase)
        collator = DataCollatorWithPadding(processing_class) if text else default_data_collator
    column = label_column(dataset)
    at_once = getattr(dataset, "__getitems__", None)  # a `Dataset` reads many rows in one go
    read = at_once(list(rows or [0])) if at_once else [dataset[row] for row in rows or [0]]
    inputs = dict(collator([_inputs_of(row) for row in read]))
    label = next((name for name in (column, "labels") if name in inputs), "labels")
    labels = torch.as_tensor(inputs.pop(label)).long()
    inputs = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    part = Part(inputs, labels)
    return part if rows else part.select([])


def _inputs_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a model or a processor takes, and the label; numbers of rows and marks are no inputs."""
    known = (
        "image",
        "text",
        "pixel_values",
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "inputs_embeds",
        "label",
        "labels",
        "label_ids",
    )
    return {name: value for name, value in row.items() if name in known}
