"""What is evaluated by several processes: each example once, and the model as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import find_batch_size, recursively_apply
from torch import Tensor

from .losses import IGNORED


class EvaluationMixin:
    """Gives a Trainer evaluations that say the same whatever the number of processes, and leave no trace."""

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        """As the stock trainer's, of which no trace is left on a model that is not trained yet.

        accelerate 1.15 takes one that it made ready for evaluation for one that is ready to be trained, and several processes would then each train
        alone, on their part of the rows, without a word.
        """
        ready = len(self.accelerator._models)
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            for model in self.accelerator._models[ready:]:
                model.__dict__.pop("_is_accelerate_prepared", None)
                if (
                    forward := model.__dict__.pop("_original_forward", None)
                ) is not None:  # under autocast it was replaced
                    model.forward = forward
            del self.accelerator._models[ready:]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As the stock trainer's, but that under several processes the loss is that of one with the same `per_device_eval_batch_size`.

        accelerate fills a last batch that does not come out even up with rows from the beginning. transformers 5.23 keeps predictions and labels of as
        many as there are, and of the processes' losses too: each a mean over rows that include the ones filled in. Here each is of a process's own.
        """
        if self.args.world_size == 1:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        size, own = find_batch_size(inputs), self._own_rows(inputs)
        # With none a step is taken with the others. Its loss is dropped, and what TRL counts of tokens must be none.
        inputs = self.each_once(inputs) if own else self._without_tokens(inputs)
        # A loss that is divided by the tokens of all would have to be counted by tokens.
        shared, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:
            loss, *told = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self.args.average_tokens_across_devices = shared
        if 0 < own < size:  # gathered, all have as many rows
            again = torch.arange(size).clamp(max=own - 1)
            told = [
                recursively_apply(lambda value: value[again.to(value.device)] if _is_of(value, own) else value, part)
                for part in told
            ]
        return (loss, *told)

    def each_once(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """A batch of an evaluation without the rows that were filled in; as it is where there would be none left."""
        size, own = find_batch_size(inputs), self._own_rows(inputs)
        if own in (0, size):
            return inputs
        return recursively_apply(lambda value: value[:own] if _is_of(value, size) else value, inputs)

    def _own_rows(self, inputs: Mapping[str, Any]) -> int:
        """How many rows of a batch are not there for the second time: the first ones."""
        size, state = find_batch_size(inputs), self.accelerator.gradient_state
        alone = self.args.world_size == 1
        if alone or not state.end_of_dataloader or state.remainder <= 0:  # it came out even, or nobody knows
            return size
        return min(max(state.remainder - self.args.process_index * size, 0), size)

    def _without_tokens(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        labels = inputs.get("labels")
        if not getattr(self, "is_causal_lm", False) or not isinstance(labels, Tensor):
            return inputs
        return {**inputs, "labels": torch.full_like(labels, IGNORED)}


def _is_of(value: Tensor, rows: int) -> bool:
    return value.dim() > 0 and len(value) == rows
