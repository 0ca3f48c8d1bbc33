"""How much is still remembered, and how useful the model still is: the two figures that the guard looks at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import broadcast
from torch import Tensor

from ..modes import in_eval_mode
from .objective import Batch


DEFAULT_TOLERANCE = {"accuracy": 0.02, "loss": 0.1, "divergence": 0.5}


LOOKING = 2**31  # a key for random numbers that no training step has


class UtilityMixin:
    """Forgetting and utility of the model as it is, measured without disturbing the run."""

    # Forgetting and utility, as the guard sees them

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Eval mode, no gradients, and afterwards the random state and training flags of before."""
        with in_eval_mode(self.model), torch.no_grad(), torch.random.fork_rng(self._random_devices):
            yield

    @property
    def _random_devices(self) -> list[torch.device]:
        return [self.args.device] if self.args.device.type == "cuda" else []

    def _mean(self, function: Callable[[Batch], Tensor], dataset) -> float:
        """Mean of a per-example quantity; under several processes all get the first one's number."""
        with self._looking():
            values = torch.cat([function(batch).float() for batch in self._batches(dataset, self.args.guard_examples)])
        return broadcast(values.mean()).item()

    def _correct(self, batch: Batch) -> Tensor:
        logits, targets = self.predictions(self.model, batch)
        return logits.argmax(-1) == targets

    def remembered(self) -> float:
        """How far from forgotten: accuracy above its target, or nats of loss below the held-out loss. ≤ 0: forgotten."""
        if self.args.forget == "class":
            return self._mean(self._correct, self.forget_dataset) - self.args.forget_accuracy
        if self.heldout_loss is None:
            return math.inf
        loss = self._mean(lambda batch: self.task_loss(self.model, batch), self.forget_dataset)
        return 0.95 * self.heldout_loss - loss  # the two are means of finite samples: they need not agree to the digit

    @property
    def utility_kind(self) -> str:
        """`"accuracy"` or `"loss"` where there is retained data to look at, else `"divergence"` on replay inputs."""
        if self._utility_dataset is self.forget_dataset:
            return "divergence"
        return "accuracy" if self.is_classifier else "loss"

    @property
    def _utility_dataset(self):
        if isinstance(self.eval_dataset, dict) and "retain" in self.eval_dataset:
            return self.eval_dataset["retain"]
        return self.forget_dataset if self.retain_dataset is None else self.retain_dataset

    @property
    def utility_tolerance(self) -> float:
        tolerance = self.args.utility_tolerance
        return DEFAULT_TOLERANCE[self.utility_kind] if tolerance is None else tolerance

    def utility(self) -> float:
        """The figure that utility is judged by; its unit is that of `utility_kind`."""
        if self.utility_kind == "accuracy":
            return self._mean(self._correct, self._utility_dataset)
        if self.utility_kind == "loss":
            return self._mean(lambda batch: self.task_loss(self.model, batch), self._utility_dataset)
        generator = self._generator(LOOKING)  # the same replay inputs at every look
        return self._mean(
            lambda batch: self.replay_loss(self.model, self.replay_inputs(batch, generator)), self._utility_dataset
        )

    def utility_drop(self, baseline: float) -> float:
        """What was lost since `baseline`: points of accuracy, nats that the loss rose by, or nats of divergence."""
        now = self.utility()
        return baseline - now if self.utility_kind == "accuracy" else now - baseline
