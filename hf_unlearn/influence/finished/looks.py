"""Backward passes over rows of a trainer that does not train: what each example's own loss, and the model's own answers, have as gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers.utils import logging

from ...modes import in_eval_mode
from ...parameters.fisher import label_cotangents
from ..targets import batched_grad
from .blocks import blocks_of
from .curvature import LARGEST, Curvature, too_large


logger = logging.get_logger(__name__)

CLASSES = 32  # a classifier with up to so many has its Fisher information summed over them, and not drawn


class Looks:
    """Looks through a trainer at its training set, at whatever parameters its model has.

    Args:
        trainer (`InfluenceTrainer`): with `observation="in_run"`; gives batches, losses and the layers that are seen.
        own_loss (`bool`): its losses are not those of labels, so that none can be drawn from the model.
        title (`str`): of the progress bar.

    Attributes:
        labels (`str`): where the curvature's labels are from: `"all"` classes, `"drawn"`, or the training set's `"own"`.
    """

    def __init__(self, trainer: Any, *, own_loss: bool):
        self.trainer, self.model, self.ghost = trainer, trainer.model, trainer._ghost
        rows = trainer.train_dataset
        self.rows = trainer._remove_unused_columns(rows) if isinstance(rows, Dataset) else rows
        self.labels = "own" if own_loss else "all"
        self.draw = 0

    def prepare(self, *, factored: bool = True) -> None:
        """Learn where the layers have their examples, and give up what takes no part; with `factored` also parameters that have no
        Kronecker factors.

        Raises:
            ValueError: the loss is not the mean of the examples' own, or nothing is left to be seen.
        """
        trainer, ghost = self.trainer, self.ghost
        if self.labels != "own":
            inputs, weight = self._batch(range(min(len(self.rows), trainer.args.eval_batch_size)))
            if weight.any():
                trainer._check_loss(inputs, weight, None)
        with self.quiet():
            if factored:
                ghost.give_up(dict.fromkeys(ghost.tied, "its layers share it"))
            seen: dict[str, str] = {}

            def visit(layer, found):
                why = f"a {type(layer.module).__name__} has no Kronecker factors" if factored else ""
                refused = dict.fromkeys(layer.names.values(), why)
                for _, block, *_ in blocks_of(layer, found) if factored else ():
                    why = f"a side of its gradient is longer than {LARGEST:,}" if too_large(block) else ""
                    refused |= dict.fromkeys(block.names, why)
                seen.update(refused)

            for _ in self.own(range(min(len(self.rows), trainer.args.eval_batch_size)), visitor=visit):
                pass
            never = dict.fromkeys(ghost.covered.keys() - seen.keys(), "it took no part")
            ghost.give_up({name: why for name, why in seen.items() if why} | never)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Eval mode, and afterwards mode, random state and `.grad` as before."""
        device = self.trainer.args.device
        devices = [device] if device.type == "cuda" else []
        with in_eval_mode(self.model), torch.random.fork_rng(devices), self.ghost:
            try:
                yield
            finally:
                self.model.zero_grad()

    def own(
        self, chosen: Sequence[int], *, visitor=None, targets: Mapping[str, Tensor] | None = None
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor | None]]:
        """Passes of the examples' own losses: positions, weights `[batch]`, and the products with targets `[batch, C]`."""
        for positions, inputs, weight in self._batches(chosen):
            self._learn(inputs, weight)
            if targets is not None:
                self.ghost.set_targets(targets)
            self._start(weight, targets is not None, visitor)
            losses, _ = self.trainer.per_example_loss(self.model, dict(inputs))
            (losses * (weight > 0)).sum().backward()
            yield self._stop(positions, weight)

    def answers(
        self, chosen: Sequence[int], *, seed: int, visitor=None, targets: Mapping[str, Tensor] | None = None
    ) -> Iterator[tuple[Mapping[str, Any], Tensor, Tensor, list[Tensor | None]]]:
        """Passes with labels from the model instead, of sums over predictions: h with E[h hᵀ] the Fisher information.

        Returns:
            of each batch its inputs, how many predictions it has, what was pulled back through what the model gave
            (`[batch, draws, …]`), and by draw the products with targets `[batch, C]`.
        """
        generator = torch.Generator(self.trainer.args.device).manual_seed(seed)
        for _, inputs, weight in self._batches(chosen):
            self._learn(inputs, weight)
            if targets is not None:
                self.ghost.set_targets(targets)
            with torch.no_grad():
                outputs, labels = self._outputs(inputs)
            if self.labels == "own":  # their own losses, of sums too
                draws = weight[:, None].to(outputs)
            else:
                every = outputs.dim() == 2 and outputs.shape[-1] <= CLASSES
                self.labels = "all" if every else "drawn"
                method = "exact" if every else "monte_carlo"
                draws = label_cotangents(outputs.float(), labels, method, 1, generator).to(outputs)
            dots = []
            for self.draw in range(draws.shape[1]):
                self._start(weight, targets is not None, visitor)
                self._outputs(inputs)[0].backward(draws[:, self.draw])
                dots.append(self._stop(weight, weight)[2])
            yield inputs, weight.sum(), draws, dots

    def _outputs(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """What labels are drawn from; of a loss of one's own, the losses."""
        if self.labels == "own":
            return self.trainer.per_example_loss(self.model, dict(inputs))[0], None
        return self.trainer.predictions(self.model, dict(inputs))

    def fisher_products(self, vectors: Tensor, chosen: Sequence[int], *, seed: int, bar) -> Tensor:
        """F v of flat vectors `[C, parameters]`, in fp32."""
        covered = list(self.ghost.covered.values())
        total, predictions = torch.zeros_like(vectors), 0.0
        for inputs, count, draws, dots in self.answers(chosen, seed=seed, targets=self.split(vectors)):
            cotangents = torch.einsum("bk...,kbc->cb...", draws, torch.stack(dots).to(draws))
            parts = batched_grad([self._outputs(inputs)[0]], covered, [cotangents])
            total += torch.cat([part.flatten(1) for part in parts], dim=1).to(total)
            predictions += count
            bar.update()
        return total / predictions

    def fisher_forms(self, vectors: Tensor, chosen: Sequence[int], *, seed: int, bar) -> Tensor:
        """⟨v, F v'⟩ of all pairs of flat vectors, `[C, C]`, in fp64."""
        total, predictions = 0, 0.0
        for _, count, _, dots in self.answers(chosen, seed=seed, targets=self.split(vectors)):
            dots = torch.cat(dots).double()
            total, predictions = total + dots.T @ dots, predictions + count
            bar.update()
        return total / predictions

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Flat vectors `[C, parameters]` by parameter, `[C, *shape]`, in the parameters' dtype."""
        covered = self.ghost.covered
        parts = flat.split([p.numel() for p in covered.values()], dim=1)
        return {n: part.reshape(-1, *p.shape).to(p.dtype) for (n, p), part in zip(covered.items(), parts, strict=True)}

    def curvature(self, chosen: Sequence[int], *, seed: int, bar) -> Curvature:
        """EK-FAC of the loss on some of the rows."""
        found = Curvature()

        def factors(layer, gradients):
            found.see_factors(layer, gradients, inputs=self.draw == 0)

        for _ in self.answers(chosen, seed=seed, visitor=factors):
            bar.update()
        found.decompose()
        for _, predictions, *_ in self.answers(chosen, seed=seed, visitor=found.see_eigenvalues):
            found.predictions += predictions.item()
            bar.update()
        found.close()
        return found

    def batches_of(self, count: int) -> int:
        return -(-count // self.trainer.args.eval_batch_size)

    def _batches(self, chosen: Sequence[int]) -> Iterator[tuple[np.ndarray, Mapping[str, Any], Tensor]]:
        size = self.trainer.args.eval_batch_size
        for start in range(0, len(chosen), size):
            positions = chosen[start : start + size]
            yield (np.asarray(positions), *self._batch(positions))

    def _batch(self, positions: Sequence[int]) -> tuple[Mapping[str, Any], Tensor]:
        inputs = self.trainer._collate([self.rows[int(row)] for row in positions])
        return inputs, self.trainer._weights(inputs).float()

    def _start(self, weight: Tensor, targets: bool, visitor) -> None:
        self.model.zero_grad()
        self.ghost.start(len(weight), targets=targets, visitor=visitor)

    def _stop(self, positions: np.ndarray, weight: Tensor) -> tuple[np.ndarray, Tensor, Tensor | None]:
        self.ghost.stop()
        self.model.zero_grad()
        return positions, weight, self.ghost.dots

    def _learn(self, inputs, weight: Tensor) -> None:
        if len(weight) > self.ghost.learned and weight.any():
            self.trainer._learn_rows(inputs, weight)
            self.model.eval()
