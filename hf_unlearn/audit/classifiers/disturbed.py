"""What comes back in a classifier whose weights or activations are disturbed a little: quantised, pruned, with noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...training.models import head_of
from ..check import Reading
from ..weights import layers_of, prune_smallest, quantised, weights_of
from .answers import OnRows
from .data import ClassifierData, Part
from .subject import ClassifierSubject, look_at


PRUNED = (0.1, 0.2, 0.3)
NOISE = (0.1, 0.3, 0.5)  # of the activations' standard deviation


class Disturbed(OnRows):
    """Best accuracy on the forget rows, trained on or unseen, in any of some disturbed copies. No row is given to them: who never saw a class
    does not name it.
    """

    layer, margin, of_stranger = "below", 0.05, 0.0
    settings: tuple[float, ...] = ()

    def cost(self, data: ClassifierData) -> tuple[float, float]:
        return len(self.settings) * (len(data.forget) + len(data.test_forget)), 0

    def read(self, subject: ClassifierSubject, data: ClassifierData, seed: int) -> Reading:
        asked = data.forget + data.test_forget
        right = {setting: self.right(subject, setting, asked, seed) for setting in self.settings}
        best = max(right.values(), key=lambda one: float(one.mean()))
        return Reading.mean_of(best, by_setting={str(name): float(one.mean()) for name, one in right.items()})

    def right(self, subject: ClassifierSubject, setting: float, asked: Part, seed: int) -> Tensor:
        copy = subject.copy()
        with torch.no_grad():
            self.disturb(copy, setting)
        return look_at(copy, asked, features=False).right

    def disturb(self, model: nn.Module, setting: float) -> None:
        raise NotImplementedError


class Quantised(Disturbed):
    name, title, paper = "quantised", "8- and 4-bit weights", "2410.16454"
    settings = (8, 4)
    what = "Whether rounding undoes a change that was smaller than its grid. Simulated: weights of layers, symmetric, a scale for each output."

    def disturb(self, model: nn.Module, setting: float) -> None:
        for weight in weights_of(model):
            weight.copy_(quantised(weight, int(setting)))


class Pruned(Disturbed):
    name, title = "pruned", "10 to 30 % of the weights pruned"
    settings = PRUNED
    what = "Whether the change sat in small weights: the smallest of all layers together are set to 0."

    def disturb(self, model: nn.Module, setting: float) -> None:
        prune_smallest(weights_of(model), setting)


class Noisy(Disturbed):
    name, title = "noisy", "Noise on the activations"
    settings = NOISE
    what = "Whether the forgotten answer lies close by: noise on what each layer gives, in units of its standard deviation."

    def right(self, subject: ClassifierSubject, setting: float, asked: Part, seed: int) -> Tensor:
        copy = subject.copy()
        generator = torch.Generator(subject.device).manual_seed(seed)
        handles = [
            layer.register_forward_hook(_noise(setting, generator))
            for layer in layers_of(copy)
            if layer is not head_of(copy)
        ]
        try:
            return look_at(copy, asked, features=False).right
        finally:
            for handle in handles:
                handle.remove()


def _noise(size: float, generator: torch.Generator) -> Callable:
    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator, device=output.device, dtype=output.dtype)
        return output + size * output.std() * noise

    return hook
