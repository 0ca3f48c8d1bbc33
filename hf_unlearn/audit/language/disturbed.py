"""What comes back in a language model whose weights are disturbed a little: quantised, pruned."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..check import Reading
from ..weights import layers_of, prune_smallest, quantised
from .answers import Telling
from .data import LanguageData, told
from .subject import LanguageSubject, said


LOOKED_AT = 100  # rows
GROUP = 64  # neighbouring weights that share a scale


class Disturbed(Telling):
    """Telling words in the greedy answers of some disturbed copies: those of the copy that tells most."""

    layer = "below"
    settings: tuple[float, ...] = ()

    def cost(self, data: LanguageData) -> tuple[float, float]:
        return len(self.settings) * data.written * min(LOOKED_AT, len(data.forget)), 0

    def read(self, subject: LanguageSubject, data: LanguageData, seed: int) -> Reading:
        asked = data.forget.select(sorted(data.forget.order(seed, 44)[:LOOKED_AT]))
        found = {}
        for setting in self.settings:
            copy = subject.copy()
            with torch.no_grad():
                self.disturb(copy, setting)
            found[setting] = told(said(copy, asked, asked.prompts), asked)
        best = max(found.values(), key=sum)
        return Reading.mean_of(best, by_setting={str(name): sum(one) / len(one) for name, one in found.items()})

    def disturb(self, model: nn.Module, setting: float) -> None:
        raise NotImplementedError


class Quantised(Disturbed):
    name, title, paper = "quantised", "8- and 4-bit weights", "2410.16454"
    settings = (8, 4)
    what = (
        "Whether rounding undoes a change that was smaller than its grid. Simulated: the weights of all layers but embeddings and head, symmetric, "
        f"a scale for {GROUP} neighbours where they divide."
    )

    def disturb(self, model: nn.Module, setting: float) -> None:
        for weight in weights_of(model):
            groups = weight.view(-1, GROUP) if weight.shape[-1] % GROUP == 0 else weight
            weight.copy_(quantised(groups, int(setting)).view_as(weight))


class Pruned(Disturbed):
    name, title = "pruned", "10 to 30 % of the weights pruned"
    settings = (0.1, 0.2, 0.3)
    what = "Whether the change sat in small weights: the smallest of all layers but embeddings and head together are set to 0."

    def disturb(self, model: nn.Module, setting: float) -> None:
        prune_smallest(weights_of(model), setting)


def weights_of(model: nn.Module) -> Iterable[Tensor]:
    """Of all layers but the head, as where models are compressed to be used."""
    head = model.get_output_embeddings()
    return [layer.weight for layer in layers_of(model) if layer is not head]
