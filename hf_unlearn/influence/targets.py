"""The behaviours that influence is measured on: sets of examples, and the gradient of their mean loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..parameters.sharding import stacked


Batch = Mapping[str, Tensor]
PerExampleLoss = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]


class Targets:
    """Target sets, each with a mean loss ℓ_c over its examples, and the gradients ∇ℓ_c.

    A look at them changes nothing in training: eval mode, random state of its own, gradients that never reach `.grad`.

    Args:
        datasets (`Mapping[str, Dataset]`): examples by name of the target, as the collator takes them.
        collate: rows → batch on the model's device.
        per_example: model, batch → losses `[batch]` and weights `[batch]`.
        batch_size (`int`): examples in one forward pass.
        seed (`int`): of the examples that are drawn for a look.
    """

    def __init__(
        self,
        datasets: Mapping[str, Sequence[Any]],
        collate: Callable[[list[Any]], Batch],
        per_example: PerExampleLoss,
        *,
        batch_size: int,
        seed: int,
    ):
        self.datasets, self.collate, self.per_example = dict(datasets), collate, per_example
        self.batch_size, self.seed = batch_size, seed

    @property
    def names(self) -> list[str]:
        return list(self.datasets)

    def gradients(
        self, model: nn.Module, parameters: Sequence[Tensor], *, step: int = 0, examples: int | None = None
    ) -> Tensor:
        """∇ℓ_c at the model's parameters: `[targets, parameters]`, flat, in the parameters' dtype.

        Args:
            step (`int`): which draw of examples.
            examples (`int`, *optional*): how many are drawn of each target; None takes all.
        """
        flat = None
        with _undisturbed(model):
            for row, name in enumerate(self.datasets):
                for losses, count in self._losses(model, name, step, examples):
                    part = torch.autograd.grad(losses.sum() / count, parameters, materialize_grads=True)
                    if flat is None:
                        size = sum(p.numel() for p in parameters)
                        flat = part[0].new_zeros(len(self.datasets), size)
                    start = 0
                    for gradient in part:
                        flat[row, start : start + gradient.numel()] += gradient.flatten()
                        start += gradient.numel()
                    del part
        return flat

    def shared_gradients(
        self, model: nn.Module, parameters: Mapping[str, Tensor], *, step: int = 0, examples: int | None = None
    ) -> dict[str, Tensor]:
        """∇ℓ_c of a model that processes share, which all ask together: by name `[targets, *shape]`, shared like the parameters. It leaves its
        `.grad` empty.

        Args:
            parameters (`Mapping[str, Tensor]`): the model's own, as they are shared.
            step, examples: as of [`~Targets.gradients`].
        """
        found: dict[str, list[Tensor]] = {name: [] for name in parameters}
        with _undisturbed(model):
            for name in self.datasets:
                for losses, count in self._losses(model, name, step, examples):
                    (losses.sum() / count).backward()  # the mean over processes, of which each had the same examples
                for name, parameter in parameters.items():
                    found[name].append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
                model.zero_grad()
        return {name: stacked(gradients) for name, gradients in found.items()}

    @torch.no_grad()
    def losses(self, model: nn.Module) -> Tensor:
        """ℓ_c, over all examples: `[targets]`, nats."""
        with _undisturbed(model):
            sums = [
                sum(losses.sum() / count for losses, count in self._losses(model, name, 0, None))
                for name in self.datasets
            ]
        return torch.stack(sums)

    @torch.no_grad()
    def losses_of_examples(self, model: nn.Module) -> Tensor:
        """ℓ of every example, one target after the other: `[examples]`, nats, float64."""
        with _undisturbed(model):
            parts = [losses for name in self.datasets for losses, _ in self._losses(model, name, 0, None)]
        return torch.cat(parts).double()

    def _losses(self, model, name: str, step: int, examples: int | None) -> Iterator[tuple[Tensor, int]]:
        rows = self.datasets[name]
        chosen = range(len(rows))
        if examples is not None and examples < len(rows):
            generator = torch.Generator().manual_seed((self.seed << 24) + step)
            chosen = torch.randperm(len(rows), generator=generator)[:examples].sort().values.tolist()
        for start in range(0, len(chosen), self.batch_size):
            part = chosen[start : start + self.batch_size]
            batch = self.collate([rows[int(row)] for row in part])
            yield self.per_example(model, batch)[0], len(chosen)


class OwnTargets(Targets):
    """Every training example is its own target: `gradients` gives one row an example, in the order of the dataset."""

    def __init__(self, dataset, collate, per_example: PerExampleLoss, *, batch_size: int):
        super().__init__({"self": dataset}, collate, per_example, batch_size=batch_size, seed=0)

    def gradients(self, model, parameters, *, step: int = 0, examples: int | None = None) -> Tensor:
        rows = []
        with _undisturbed(model):
            for losses, _ in self._losses(model, "self", 0, None):
                each = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
                parts = batched_grad([losses], parameters, [each])
                rows.append(torch.cat([part.flatten(1) for part in parts], dim=1))
        return torch.cat(rows)


def own_gains(gains: Tensor, weight: Tensor) -> Tensor:
    """What a batch tells of examples that are their own targets.

    Args:
        gains (`Tensor`): `[batch, batch]`, the gain on example i (row) that example j (column) would give as a batch.
        weight (`Tensor`): `[batch]`, predictions in each.

    Returns:
        `Tensor`: `[batch, 3]`: the gain of the example on itself, the batch's mean gain on it, and the variance of that mean.
    """
    share, size = weight / weight.sum(), len(weight)
    mean = gains @ share
    spread = ((gains - mean[:, None]) ** 2) @ share**2
    variance = spread * size / (size - 1) if size > 1 else torch.full_like(spread, torch.nan)
    return torch.stack([gains.diagonal(), mean, variance], dim=1)


def batched_grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor], *, at_once: int = 64
) -> list[Tensor]:
    """Vector-Jacobian products of many vectors, `[vectors, …]` each: `at_once` together where every operation can, else one by one."""
    kept = [index for index, output in enumerate(outputs) if output.requires_grad]
    outputs, vectors = [outputs[index] for index in kept], [vectors[index] for index in kept]
    options = {"retain_graph": True, "materialize_grads": True}
    parts = []
    for chunk in zip(*(vector.split(at_once) for vector in vectors), strict=True):
        together = None
        if len(chunk[0]) > 1:
            with suppress(RuntimeError):  # of an operation that cannot be batched
                together = torch.autograd.grad(outputs, inputs, chunk, is_grads_batched=True, **options)
        if together is None:
            rows = [torch.autograd.grad(outputs, inputs, row, **options) for row in zip(*chunk, strict=True)]
            together = [torch.stack(stacked) for stacked in zip(*rows, strict=True)]
        parts.append(together)
    return [torch.cat(same) for same in zip(*parts, strict=True)]


class _undisturbed:
    """Eval mode inside, and modes and random state as before afterwards."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self):
        self.training = [module for module in self.model.modules() if module.training]
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        self.random = torch.random.fork_rng(devices=list(devices))
        self.random.__enter__()
        self.model.eval()

    def __exit__(self, *error):
        self.random.__exit__(*error)
        for module in self.training:
            module.training = True
