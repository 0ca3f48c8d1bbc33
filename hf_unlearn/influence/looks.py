"""What an influence trainer looks at before it relies on it: that the loss is a mean over examples, and where a layer has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..parameters.sharding import is_sharded, is_shared, let_go, own, summed
from .propagated.trajectory import random_states, set_random_states
from .targets import Batch


LOOK_EVERY = 64  # steps between two looks at the loss


class LookingMixin:
    """Looks at the model and the loss of the trainer that it is mixed into. They leave nothing behind."""

    @contextmanager
    def _watched_loss(self) -> Iterator[None]:
        """Inside, what comes down to the loss is seen: the accumulation's divisor, the scaler's factor.

        Around whatever `compute_loss` this trainer has, as a subclass's need not call this one's.
        """
        own, compute_loss = self.__dict__.get("compute_loss"), self.compute_loss

        def watched(*args, **kwargs):
            result = compute_loss(*args, **kwargs)
            loss, *others = result if isinstance(result, tuple) else (result,)
            loss = _Factor.apply(loss, self)
            return (loss, *others) if isinstance(result, tuple) else loss

        self.compute_loss = watched
        try:
            yield
        finally:
            del self.compute_loss
            if own is not None:
                self.compute_loss = own

    def _is_looked_at(self, step: int) -> bool:
        """Whether the loss is looked at in this step: in those of a run that are powers of two from where it began, every 64th, and the
        last. A term that starts at nothing, or late, is met that way; a look costs two forward and backward passes.
        """
        since = step - self._first_step
        is_last = step == self.state.max_steps - 1
        return self._normalised_by is None or since & (since - 1) == 0 or since % LOOK_EVERY == 0 or is_last

    @contextmanager
    def _unnoticed(self) -> Iterator[None]:
        """Forward and backward passes of the model itself, that leave nothing behind: gradients, statistics, random numbers, TRL's
        running averages.
        """
        let_go(self.model)
        gradients = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        shared = is_shared(self.model)
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        metrics = getattr(self, "_metrics", {}).get("train", {})
        averages, tokens = (
            {name: list(values) for name, values in metrics.items()},
            getattr(self, "_total_train_tokens", 0),
        )
        self.model.zero_grad()
        self.model.train()
        try:
            if shared:  # also within an accumulation, for the time of which gradients stay where they are
                self.model.set_requires_gradient_sync(True)
            with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
                yield
        finally:
            if shared:
                self.model.set_requires_gradient_sync(self.accelerator.sync_gradients)
            let_go(self.model)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            if hasattr(self, "_metrics"):
                metrics.clear()
                metrics.update(averages)
            if hasattr(self, "_total_train_tokens"):
                self._total_train_tokens = tokens

    def _learn_rows(self, inputs: Batch, weight: Tensor) -> None:
        """See [`GhostRecorder.learn_rows`]."""
        norms = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        # Where weights are zero, as a fresh adapter's are, no gradient would arrive at what lies before them.
        let_go(self.model)
        zeros = [own(p) for p in self.model.parameters() if p.is_floating_point() and not own(p).any()]
        # Those with most predictions: of a single token nothing may arrive at what tells its place from others'.
        examples = ((weight == weight.max()) & (weight > 0)).nonzero().squeeze(1).tolist()
        if len(examples) == 1:
            examples = [row for row in weight.argsort(descending=True)[:2].tolist() if weight[row] > 0]
        examples = examples or [0]  # none where it is another process that wants to look

        def losses() -> Tensor:
            set_random_states(state, self.args.device)
            with self.compute_loss_context_manager():
                return self.per_example_loss(self.model, dict(inputs))[0]

        with self._unnoticed():
            state = random_states(self.args.device)
            try:
                with torch.no_grad():
                    for parameter in zeros:
                        parameter.normal_(std=0.02)
                for module in norms:
                    module.eval()
                self._ghost.learn_rows(losses, len(weight), examples)
            finally:
                for module in norms:
                    module.train()
                with torch.no_grad():
                    for parameter in zeros:
                        parameter.zero_()
        if self._target_gradients is not None:
            self._ghost.set_targets(self._target_gradients)

    def _check_loss(self, inputs: Batch, weight: Tensor, num_items_in_batch: Tensor | int | None) -> str:
        """Whether the batch's loss is a mean over the micro-batch ("batch") or over the whole step ("step"), by its gradient.

        The examples' own losses go on top of it with the other sign, so that what is left in `.grad` is what is not theirs: a
        penalty, weights of classes, smoothed labels, an auxiliary loss, by whoever's `compute_loss`.

        Raises:
            ValueError: it is neither, so its gradient is not a sum over examples that are weighted as they should be.
        """
        # Of twice as many items, so that a step of one micro-batch, as at the end of an epoch, tells the two apart as well.
        items = None if num_items_in_batch is None else 2 * num_items_in_batch
        scale = self._loss_scale()
        with self._unnoticed():
            state = random_states(self.args.device)
            with self.compute_loss_context_manager():
                loss = self.compute_loss(self.model, dict(inputs), num_items_in_batch=items)
            loss = loss[0] if isinstance(loss, tuple) else loss
            (scale * loss).backward()
            whole = self._norm()
            set_random_states(state, self.args.device)
            with self.compute_loss_context_manager():
                each, _ = self.per_example_loss(self.model, dict(inputs))
            summed = (each * weight).sum()
            choices = {"batch": summed / weight.sum().clamp(min=1)}
            if items is not None:
                choices["step"] = summed / self._items_per_step(items)
            name = min(choices, key=lambda name: (choices[name] - loss).abs().item())
            (-scale * choices[name]).backward()
            rest = self._norm()
            low = torch.is_autocast_enabled(self.args.device.type) or self.args.bf16 or self.args.fp16
        low = low or any(parameter.dtype.itemsize < 4 for parameter in self._parameters.values())
        # A converged batch's gradient is rounding; the fp16 scaler's first factors may overflow, and it then skips the step.
        self._largest_gradient = max(self._largest_gradient, whole if np.isfinite(whole) else 0.0)
        bound = (0.05 if low else 0.01) * max(whole, 1e-3 * self._largest_gradient)
        if np.isfinite([whole, rest]).all() and rest > bound:
            raise ValueError(
                f"compute_loss: at step {self.state.global_step + 1} it is not the mean of the examples' own losses: of its gradient "
                f"{rest / max(whole, rest):.2g} parts in 1 are something else (a penalty, class weights, label smoothing, an auxiliary loss?); "
                "leave it out, or override per_example_loss"
            )
        return name

    def _norm(self) -> float:
        """Of all gradients together."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        if not gradients:
            return 0.0
        norm = torch.stack([own(gradient).float().norm() for gradient in gradients]).norm()
        return norm.item() if not is_sharded(gradients) else summed(norm.square(), gradients[0]).sqrt().item()

    def _items_per_step(self, num_items_in_batch: Tensor | int) -> Tensor | float:
        """What the losses of a step are divided by, on this process."""
        shared = self.args.average_tokens_across_devices
        return num_items_in_batch / (self.args.world_size if shared else 1)

    def _loss_scale(self) -> float:
        scaler = self.accelerator.scaler
        return scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0


class _Factor(torch.autograd.Function):
    """Identity on the loss that sees what its gradient is multiplied by."""

    @staticmethod
    def forward(ctx, loss, trainer):
        ctx.trainer = trainer
        return loss.detach()

    @staticmethod
    def backward(ctx, gradient):
        ctx.trainer._upstream = gradient.detach().float()
        return gradient, None
