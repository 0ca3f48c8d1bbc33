"""How soon a language model says again what it was to forget: from retained rows alone, from unrelated ones, from five of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch import nn

from ..audited import reshuffled, trained_on
from ..check import Reading, Role
from ..weights import size_of_weights
from .answers import Telling
from .data import LanguageData, Part, told
from .disturbed import LOOKED_AT
from .subject import LanguageSubject, losses, said


MARKS = (5, 10, 20, 40)  # steps after which is looked
BATCH = 8  # rows of a step
SHOWN = 5  # forget rows that are trained on, where any are
RATE = 0.005  # of a step of AdamW, in root mean squares of the weights
ADAPTER = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class Relearning(Telling):
    """A check that trains a copy for 40 steps and looks on the way how many of the telling words are said again, of forget rows that it is not
    shown. The value is the largest share.
    """

    layer, paper = "below", "2406.13356"
    times = 1.0  # the rate
    parts = ("forget", "retain")

    def cost(self, data: LanguageData) -> tuple[float, float]:
        return data.written * (len(MARKS) + 1) * min(LOOKED_AT, len(data.forget)), MARKS[-1] * BATCH

    def missing(self, data: LanguageData, roles: Sequence[Role]) -> str | None:
        return "a single forget row leaves none to ask about" if len(data.forget) < 2 else super().missing(data, roles)

    def read(self, subject: LanguageSubject, data: LanguageData, seed: int) -> Reading:
        shown, asked = shown_and_asked(data, seed)
        model = subject.copy().float()  # steps are lost in 16 bits
        rate = self.times * RATE * size_of_weights(model)
        model, batch = self.prepared(model), drawn(self.rows(shown, data), seed)
        curve = [told(said(model, asked, asked.prompts), asked)]
        for attacked in trained(model, batch, rate):
            curve.append(told(said(attacked, asked, asked.prompts), asked))
        means = np.mean(curve, axis=1)
        return Reading.mean_of(curve[int(means.argmax())], steps=[0, *MARKS], curve=means.tolist(), rate=rate)

    def prepared(self, model: nn.Module) -> nn.Module:
        """The copy as training begins with it."""
        return model

    def rows(self, shown: Part, data: LanguageData) -> Part:
        """What is trained on."""
        raise NotImplementedError


class RelearnRetained(Relearning):
    name, title = "relearn_retained", "Relearning from retained rows alone"
    what = "Whether going on with the training, without one forgotten row, brings the others back."

    def rows(self, shown: Part, data: LanguageData) -> Part:
        return data.retain


class RelearnUnrelated(Relearning):
    name, title = "relearn_unrelated", "Relearning from rows that no model saw"
    parts = ("forget", "test")
    what = "Whether any training of the same kind brings it back: on the unseen rows."

    def rows(self, shown: Part, data: LanguageData) -> Part:
        return data.test


class RelearnFew(Relearning):
    name, title = "relearn_few", f"Relearning from {SHOWN} of the forgotten rows"
    parts = ("forget",)
    what = "How many of the other forgotten rows a few of them bring back, which teach a model nothing that never saw the others."

    def rows(self, shown: Part, data: LanguageData) -> Part:
        return shown


class RelearnFewLora(RelearnFew):
    name, title = "relearn_few_lora", f"Relearning from {SHOWN} of the forgotten rows by an adapter"
    what = "As with all weights, by a LoRA of rank 8 on every linear layer: what who has little memory would do."
    times = 5.0

    def prepared(self, model: nn.Module) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        with warnings.catch_warnings(action="ignore"):  # of tied embeddings, which are not adapted
            return get_peft_model(model, LoraConfig(**ADAPTER))


def shown_and_asked(data: LanguageData, seed: int) -> tuple[Part, Part]:
    """Forget rows that may be trained on, and others that are asked about."""
    order = data.forget.order(seed, 45)
    few = min(SHOWN, len(order) // 2)
    return data.forget.select(order[:few]), data.forget.select(sorted(order[few:][:LOOKED_AT]))


def drawn(part: Part, seed: int) -> Callable[[int], Part]:
    """Batches of a part by step."""
    rows = reshuffled(len(part), min(BATCH, len(part)), MARKS[-1], seed, 46)
    return lambda step: part.select(rows[step].tolist())


def trained(model: nn.Module, batch: Callable[[int], Part], rate: float) -> Iterator[nn.Module]:
    """The model after each of the marks' steps."""
    for _ in trained_on(model, lambda step: losses(model, batch(step)).mean(), MARKS, rate):
        yield model
