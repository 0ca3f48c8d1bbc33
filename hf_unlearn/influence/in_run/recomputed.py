"""Gradients of single examples of a layer that has no rule: it runs again on the rows of one example at a time.

Costs about another forward and backward pass of the layer, and holds one example's gradient of one parameter. So fused experts of a
mixture are seen, one-dimensional convolutions, routers, bilinear layers, adapters like IA³ or LoHa, and layers of one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_unflatten


class RecomputedGradients:
    """Of any other parameter: the layer runs again on one example's rows at a time, and is differentiated."""

    def __init__(self, gradient: Callable[[int], Tensor], batch: int):
        self.gradient, self.batch = gradient, batch

    def dots(self, targets: Tensor, form_gradients: bool) -> Tensor:
        return torch.stack([targets.flatten(1).to(h.dtype) @ h for h in self._each()])

    def gram(self) -> Tensor:
        h = torch.stack(list(self._each()))
        return h @ h.T

    def factors(self) -> None:
        return None

    def _each(self) -> Iterator[Tensor]:
        for example in range(self.batch):
            h = self.gradient(example).flatten()
            yield h.to(torch.promote_types(h.dtype, torch.float32))


@dataclass(frozen=True)
class Call:
    """One call of a layer, to be made again with the rows of a single example.

    Attributes:
        arguments (`list`): positional and keyword arguments, flattened.
        structure (`TreeSpec`): of them.
        rows (`int`): of what has so many rows, and a whole number an example, each example is given its own.
        autocast (`dtype`, *optional*): that the layer ran under.
    """

    arguments: list[Any]
    structure: TreeSpec
    rows: int
    autocast: torch.dtype | None

    def outputs(self, module: nn.Module, example: int, batch: int) -> list[Any]:
        args, kwargs = tree_unflatten([self.part(each, example, batch) for each in self.arguments], self.structure)
        device = next(module.parameters()).device.type
        # No cache: what it keeps of a weight would be of another graph.
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None, cache_enabled=False):
            found = module.forward(*args, **kwargs)  # past the hooks
        return list(found) if isinstance(found, tuple) else [found]

    def part(self, value: Any, example: int, batch: int) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != self.rows or self.rows % batch:
            return value
        return value.unflatten(0, (batch, -1))[example]

    def repeats(self, module: nn.Module, outputs: Sequence[Tensor], batch: int) -> bool:
        """Whether single examples give what the batch gave: there is no dropout, and nothing goes from one to another."""
        try:
            for example in {0, batch - 1}:
                with torch.no_grad():
                    found = self.outputs(module, example, batch)
                for one, whole in zip(found, outputs, strict=True):
                    if isinstance(whole, Tensor) and whole.is_floating_point():
                        loose = whole.dtype.itemsize < 4
                        bound = (2e-2 if loose else 1e-4) * whole.abs().max().item() + 1e-12
                        mine = whole.unflatten(0, (batch, -1))[example] if len(whole) % batch == 0 else whole
                        torch.testing.assert_close(one, mine, rtol=0, atol=bound)
        except Exception:  # it wants the whole batch, in whatever way
            return False
        return True


def recomputed(
    module: nn.Module, call: Call, ys: Sequence[Tensor | None], batch: int, names: Iterable[str]
) -> dict[str, RecomputedGradients]:
    """`ys` are the gradients of the call's outputs, None where there is none."""

    def gradient(name: str, example: int) -> Tensor:
        with torch.enable_grad():
            outputs = call.outputs(module, example, batch)
            pairs = [(one, y) for one, y in zip(outputs, ys, strict=True) if y is not None and one.requires_grad]
            cotangents = [y.unflatten(0, (batch, -1))[example].view_as(one) for one, y in pairs]
            parameter = module.get_parameter(name)
            (found,) = torch.autograd.grad([one for one, _ in pairs], [parameter], cotangents, materialize_grads=True)
        return found

    return {name: RecomputedGradients(partial(gradient, name), batch) for name in names}
