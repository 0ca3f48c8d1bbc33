"""What an influence trainer looks at before it relies on it: that the loss is a mean over examples, and where a layer has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.utils import logging

from ..parameters.sharding import is_sharded, is_shared, let_go, own, summed
from ..training.models import CLASSES
from .propagated.trajectory import random_states, set_random_states
from .targets import Batch


logger = logging.get_logger(__name__)

LOOK_EVERY = 64  # steps between two looks at the loss
LEAVE_OUT = "leave it out, or override per_example_loss"
SURE = 1e-4  # length of a loss's gradient at its logits, in fp32, below which it is mostly rounding


class LookingMixin:
    """Looks at the model and the loss of the trainer that it is mixed into. They leave nothing behind."""

    _weighs = False  # whether the loss is Σ cᵢ ℓᵢ with the trainer's own cᵢ, such as weights of classes

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

    def _all_was_looked_at(self, step: int) -> bool:
        """Whether nothing was recorded before this step that was not looked at."""
        return step == self._first_step or (
            step <= self._first_step + 2 and self.args.gradient_accumulation_steps == 1
        )

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

    def _check_loss(
        self, inputs: Batch, weight: Tensor, num_items_in_batch: Tensor | int | None, may_weigh: bool = False
    ) -> str:
        """Whether the batch's loss is a mean over the micro-batch ("batch") or over the whole step ("step"), by its gradient.

        The examples' own losses go on top of it with the other sign, so that what is left in `.grad` is what is not theirs: a
        penalty, smoothed labels, an auxiliary loss, by whoever's `compute_loss`. Where it `may_weigh`, and the loss is no mean but a sum
        of them with weights of its own, as of classes, it is from then on taken with these.

        Raises:
            ValueError: it is neither, so its gradient is not a sum over examples that are weighted as they should be.
        """
        # Of twice as many items, so that a step of one micro-batch, as at the end of an epoch, tells the two apart as well.
        items = None if num_items_in_batch is None else 2 * num_items_in_batch
        scale = self._loss_scale()
        reads = self._weighs or (may_weigh and self._tells_weights)
        with self._unnoticed():
            state = random_states(self.args.device)
            with self.compute_loss_context_manager(), seen_logits(self.model, with_gradient=reads) as logits:
                loss = self.compute_loss(self.model, dict(inputs), num_items_in_batch=items)
            loss = loss[0] if isinstance(loss, tuple) else loss
            (scale * loss).backward()
            shares = self._shares(logits, inputs, scale * weight / weight.sum().clamp(min=1)) if reads else None
            whole = self._norm()
            set_random_states(state, self.args.device)
            with self.compute_loss_context_manager():
                each, _ = self.per_example_loss(self.model, dict(inputs))
            summed = (each * weight).sum()
            mean_over = {"batch": weight.sum().clamp(min=1)}
            if items is not None:
                mean_over["step"] = self._items_per_step(items)
            name = min(mean_over, key=lambda name: (summed / mean_over[name] - loss).abs().item())
            taken, mean = summed / mean_over[name], weight / mean_over[name]
            if shares is not None:
                shares = shares / scale
                differs = (shares - mean).norm() > self._slack * shares.norm()
                weighed = (shares * each).sum()  # other than the loss, where weights depend on the model
                self._weighs |= bool(differs and (weighed - loss).abs() <= self._slack * loss.abs())
                taken = weighed if self._weighs else taken
            (-scale * taken).backward()
            rest = self._norm()
        # A converged batch's gradient is rounding; the fp16 scaler's first factors may overflow, and it then skips the step.
        self._largest_gradient = max(self._largest_gradient, whole if np.isfinite(whole) else 0.0)
        bound = self._slack * max(whole, 1e-3 * self._largest_gradient)
        if np.isfinite([whole, rest]).all() and rest > bound:
            raise ValueError(
                f"compute_loss: at step {self.state.global_step + 1} it is not the mean of the examples' own losses: of its gradient "
                f"{rest / max(whole, rest):.2g} parts in 1 are something else (a penalty, label smoothing, an auxiliary loss?); {LEAVE_OUT}"
            )
        return "batch" if self._weighs else name

    @property
    def _slack(self) -> float:
        """Share of a gradient that may be rounding."""
        low = torch.is_autocast_enabled(self.args.device.type) or self.args.bf16 or self.args.fp16
        return 0.05 if low or any(p.dtype.itemsize < 4 for p in self._parameters.values()) else 0.01

    @property
    def _tells_weights(self) -> bool:
        """Whether the loss of an example is known from its own logits."""
        return not (self._has_own_loss or self.is_causal_lm or self.reads_labels)

    def _shares(self, seen: list[Tensor], inputs: Batch, of_mean: Tensor) -> Tensor | None:
        """cᵢ of a batch's loss that is Σ cᵢ ℓᵢ, ℓᵢ the examples' own, by its gradient at the logits: `[batch]`, ≥ 0, with whatever else the
        gradient was multiplied by; None where it is no such sum, or the logits do not say. `of_mean` are those of a mean.
        """
        labels = inputs.get((self.label_names or ["labels"])[0])
        if not seen or seen[0].grad is None:
            return None
        logits = seen[0].detach().float().requires_grad_()
        if self.problem(labels) != CLASSES:
            labels = labels.reshape(len(labels), -1)
        if labels.shape not in (logits.shape, logits.shape[:-1]):
            return None
        (own_gradients,) = torch.autograd.grad(self._losses_of(logits, labels).sum(), logits)
        own_gradients, gradients = own_gradients.flatten(1), seen[0].grad.float().flatten(1)
        square = own_gradients.square().sum(1)
        shares = (own_gradients * gradients).sum(1) / square
        sure = square > SURE**2
        if (shares[sure] < 0).any():
            return None
        # Of an example that is learnt no gradient tells; it has next to none to share.
        ratio = shares[sure].sum() / of_mean[sure].sum() if sure.any() else 1.0
        shares = torch.where(sure, shares, ratio * of_mean)
        rest = gradients - shares[:, None] * own_gradients
        return shares if rest.norm() <= self._slack * gradients.norm() else None

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


@contextmanager
def seen_logits(model: nn.Module, with_gradient: bool = False) -> Iterator[list[Tensor]]:
    """Inside, the logits of the model's last forward pass are in the list, and after the backward pass, `with_gradient`, theirs in `.grad`."""
    seen: list[Tensor] = []

    def keep(module, arguments, outputs):
        logits = logits_of(outputs)
        seen[:] = [logits] if isinstance(logits, Tensor) else []
        if seen and with_gradient and logits.requires_grad:
            logits.retain_grad()

    handle = model.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def logits_of(outputs: Any) -> Any:
    """Of a model that was given no labels: with them gone, the first of a tuple."""
    if isinstance(outputs, tuple):
        return outputs[0]
    return outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)


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
