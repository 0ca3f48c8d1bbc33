"""How soon a classifier knows again what it was to forget: from some of it, from retained rows alone, from rows that mean nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...modes import seeded_generator
from ...training.losses import cross_entropy
from ...training.models import head_of
from ..audited import reshuffled, trained_on
from ..check import Reading, Role
from ..weights import size_of_weights
from .answers import OnRows
from .data import ClassifierData, Part
from .subject import ClassifierSubject, Look, look_at


MARKS = (1, 2, 3, 5, 8, 12, 20)  # steps after which is looked
BATCH, FORGET_ROWS = 32, 2  # of a step; few of them tell those that know from those that learn
RATE = 0.01  # of a step of AdamW, in root mean squares of the weights
LOOKED_AT = 200  # rows


class Relearning(OnRows):
    """A check that trains a copy for 20 steps and looks on the way whether the forgotten rows are known again."""

    layer = "below"
    parts = ("forget", "retain")
    of_stranger = 0.0

    def cost(self, data: ClassifierData) -> tuple[float, float]:
        return (len(MARKS) + 1) * min(LOOKED_AT, len(data.forget) + len(data.test_forget)), MARKS[-1] * BATCH

    def missing(self, data: ClassifierData, roles: Sequence[Role]) -> str | None:
        return "a single forget row leaves none to ask about" if len(data.forget) < 2 else super().missing(data, roles)

    def read(self, subject: ClassifierSubject, data: ClassifierData, seed: int) -> Reading:
        shown, asked = self.halves(data, seed)
        model = self.prepared(subject.copy(), data)
        looks = [look_at(model, asked, features=False)]
        looks += [look_at(copy, asked, features=False) for copy in trained(model, self.batches(shown, data, seed))]
        right = torch.stack([look.right for look in looks])
        return Reading.mean_of(self.value(looks), steps=[0, *MARKS], curve=right.mean(1).tolist())

    def halves(self, data: ClassifierData, seed: int) -> tuple[Part, Part]:
        """Forget rows to train on, and rows to ask about: all of them, and unseen ones of their classes, where none is trained on."""
        asked = data.forget + data.test_forget
        return data.forget.select([]), asked.select(range(min(LOOKED_AT, len(asked))))

    def prepared(self, model: nn.Module, data: ClassifierData) -> nn.Module:
        """The copy as training begins with it."""
        return model

    def batches(self, shown: Part, data: ClassifierData, seed: int) -> Callable[[int], Part]:
        """What is trained on in each step."""
        raise NotImplementedError

    def value(self, looks: Sequence[Look]) -> Tensor:
        """`[n]`: which rows are right where most are on the way."""
        return max((look.right for look in looks), key=lambda right: float(right.mean()))


class RelearnForget(Relearning):
    name, title, margin = "relearn_forget", "Relearning from forget data", 0.05
    of_stranger = None
    what = (
        "How soon the class is back where some of its rows are at hand: what others of them are given, averaged over 20 steps. The head "
        "forgets its row of the class first, so that no bias hides what lies below."
    )

    def halves(self, data: ClassifierData, seed: int) -> tuple[Part, Part]:
        part = data.forget.shuffled(seed, 21)
        middle = (len(part) + 1) // 2
        asked = part.select(range(middle, len(part))) + data.test_forget
        return part.select(range(middle)), asked.select(range(min(LOOKED_AT, len(asked))))

    def prepared(self, model: nn.Module, data: ClassifierData) -> nn.Module:
        head, gone = head_of(model), data.is_forgotten
        with torch.no_grad():
            for parameter in (head.weight, head.bias):
                if parameter is not None and gone.any():
                    parameter[gone] = parameter[~gone].mean(0)
        return model

    def batches(self, shown: Part, data: ClassifierData, seed: int) -> Callable[[int], Part]:
        one, two = drawn(shown, FORGET_ROWS, seed, 31), drawn(data.retain, BATCH - FORGET_ROWS, seed, 32)
        return lambda step: one(step) + two(step)

    def value(self, looks: Sequence[Look]) -> Tensor:
        return torch.stack([look.probabilities.gather(1, look.labels[:, None])[:, 0] for look in looks[1:]]).mean(0)


class RelearnBesideNew(RelearnForget):
    name, title, margin = "relearn_beside_new", "Relearning beside a class never seen", 0.05
    what = (
        "By how much sooner the class is back than one that nobody saw, made of the same rows with their pixels (or tokens) in one other order, is learned: a model that "
        "learns everything slowly cannot hide in that."
    )

    def cost(self, data: ClassifierData) -> tuple[float, float]:
        return tuple(2 * count for count in super().cost(data))

    def missing(self, data: ClassifierData, roles: Sequence[Role]) -> str | None:
        return super().missing(data, roles) if data.classes else "single examples were to be forgotten, not classes"

    def read(self, subject: ClassifierSubject, data: ClassifierData, seed: int) -> Reading:
        known, new = (super(RelearnBesideNew, self).read(subject, rows, seed) for rows in (data, never_seen(data)))
        sooner = torch.tensor(known.per_example) - torch.tensor(new.per_example)
        return Reading.mean_of(sooner, **known.figures, new=new.figures["curve"])

    def value(self, looks: Sequence[Look]) -> Tensor:
        """Beyond what the rows were given before the first step, which differs between rows that resemble other classes and such that resemble none."""
        first = looks[0].probabilities.gather(1, looks[0].labels[:, None])[:, 0]
        return super().value(looks) - first


class RelearnRetained(Relearning):
    name, title, margin, paper = "relearn_retained", "Relearning from retained data alone", 0.05, "2505.22310"
    what = (
        "Whether going on with the training, without one forgotten row, brings it back: the best accuracy on the way."
    )

    def batches(self, shown: Part, data: ClassifierData, seed: int) -> Callable[[int], Part]:
        return drawn(data.retain, BATCH, seed, 33)


class RelearnUnrelated(Relearning):
    name, title, margin = "relearn_unrelated", "Relearning from unrelated data", 0.05
    what = "Whether any training at all brings it back: on retained inputs in pieces, with retained labels at random."

    def batches(self, shown: Part, data: ClassifierData, seed: int) -> Callable[[int], Part]:
        real, generator = drawn(data.retain, BATCH, seed, 34), seeded_generator("cpu", seed, 35)

        def batch(step: int) -> Part:
            part = real(step)
            inputs = {name: in_pieces(value, generator) for name, value in part.inputs.items()}
            return Part(inputs, part.labels[torch.randperm(len(part), generator=generator)])

        return batch


def never_seen(data: ClassifierData) -> ClassifierData:
    """The same with a class in place of the forgotten ones that nobody saw: pixels of all rows in one other order, tokens all exchanged for others."""
    both, count = data.forget + data.test_forget, len(data.forget)
    inputs = {}
    for number, (name, value) in enumerate(both.inputs.items()):
        generator = seeded_generator("cpu", 41, number)
        if value.is_floating_point():
            flat = value.flatten(1)
            inputs[name] = flat[:, torch.randperm(flat.shape[1], generator=generator)].view(value.shape)
        elif _is_mask(value):
            inputs[name] = value
        else:
            known, places = value.unique(return_inverse=True)
            inputs[name] = known[torch.randperm(len(known), generator=generator)][places]
    made = Part(inputs, both.labels)
    return replace(data, forget=made.select(range(count)), test_forget=made.select(range(count, len(made))))


def _is_mask(values: Tensor) -> bool:
    return values.dim() < 2 or (values.dim() == 2 and bool((values <= 1).all()))


def in_pieces(values: Tensor, generator: torch.Generator) -> Tensor:
    """Images with their pixels, texts with their tokens in random places; masks as they are."""
    if _is_mask(values):
        return values
    flat = values.flatten(1)
    order = torch.rand(flat.shape, generator=generator).argsort(1)
    return flat.gather(1, order).view(values.shape)


def drawn(part: Part, size: int, seed: int, key: int) -> Callable[[int], Part]:
    """Batches of a part by step."""
    rows = reshuffled(len(part), size, MARKS[-1], seed, key)
    return lambda step: part.select(rows[step])


def trained(model: nn.Module, batch: Callable[[int], Part]) -> Iterator[nn.Module]:
    """The model after each of the marks' steps, at a rate in units of the weights' size."""
    device = next(model.parameters()).device

    def loss(step: int) -> Tensor:
        ((inputs, labels),) = batch(step).batches(device)
        return cross_entropy(model(**inputs).logits, labels).mean()

    for _ in trained_on(model, loss, MARKS, RATE * size_of_weights(model)):
        yield model
