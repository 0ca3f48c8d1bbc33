"""The step of an influence trainer: training as always, and what it tells of the examples in the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate.utils import gather, pad_across_processes
from datasets import Dataset
from torch import Tensor, nn
from transformers.utils import logging

from ..files import first_line
from ..parameters.sharding import is_shared, own, whole
from ..training.collators import ROW, RowCollator, WithRow
from ..training.losses import IGNORED, binary_cross_entropy, cross_entropy, next_tokens, squared_error
from ..training.models import CLASSES, problem_of
from .in_run.layers import low_rank
from .looks import LEAVE_OUT, LookingMixin, logits_of, seen_logits
from .propagated.trajectory import MicroBatch, random_states
from .targets import Batch, OwnTargets, Targets, own_gains


logger = logging.get_logger(__name__)


class RecordingMixin(LookingMixin):
    """Training steps that are observed. The updates are those of the trainer it is mixed into."""

    # Losses

    def per_example_loss(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, Tensor]:
        """The task's own loss on each example, and how many predictions it is the mean of.

        Returns:
            losses `[batch]` in nats, with gradient, and weights `[batch]`: the batch's loss is their weighted mean.
        """
        logits, labels = self.predictions(model, inputs)
        return self._losses_of(logits, labels), self._weights_of(labels)

    def _losses_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return _LOSSES[self.problem(labels)](logits, labels)

    @property
    def _has_own_loss(self) -> bool:
        return type(self).per_example_loss is not RecordingMixin.per_example_loss

    def problem(self, labels: Tensor) -> str:
        """What the model's head takes labels for, as [`~hf_unlearn.training.models.problem_of`]."""
        return problem_of(self.model, labels)

    def predictions(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, Tensor]:
        """Logits `[batch, …, classes]` with gradient, and their labels `[batch, …]`, −100 where a prediction does not count. Of numbers, and of several
        labels at once, `[batch, numbers]` both.
        """
        inputs = {name: value for name, value in inputs.items() if name != ROW}
        label = (self.label_names or ["labels"])[0]
        if label not in inputs:
            raise ValueError(f"{label}: missing in the batch; the collator or the dataset must provide it")
        labels = inputs[label] if self.reads_labels else inputs.pop(label)
        if self.is_causal_lm or self.reads_labels:
            inputs["use_cache"] = False
        logits = logits_of(model(**inputs))
        if self.problem(labels) != CLASSES and isinstance(logits, Tensor):
            labels = labels.reshape(len(labels), -1)
            fits = logits.shape == labels.shape
        elif self.is_causal_lm and isinstance(logits, Tensor) and logits.dim() == 3:
            logits, labels = next_tokens(logits, labels)
            fits = logits.shape[:-1] == labels.shape
        else:
            fits = isinstance(logits, Tensor) and logits.shape[:-1] == labels.shape
        if not fits:
            given = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"model: its logits ({given}) do not fit {label} {list(labels.shape)}: it needs one prediction a label; pass a "
                "classifier or a language model, or override per_example_loss"
            )
        return logits, labels

    def _weights(self, inputs: Batch) -> Tensor:
        """`per_example_loss`'s weights, from the labels alone."""
        labels = inputs[(self.label_names or ["labels"])[0]]
        return self._weights_of(labels[:, 1:] if self.is_causal_lm else labels)

    def _weights_of(self, labels: Tensor) -> Tensor:
        if self.problem(labels) != CLASSES:
            return torch.ones(len(labels), device=labels.device)
        return _predictions(labels)

    # Batches that know their rows

    def get_train_dataloader(self):
        dataset = self.train_dataset
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, description="training")
        collator = self._get_collator_with_removed_columns(self.data_collator, description="training")
        whole, self.data_collator = self.data_collator, RowCollator(collator)
        try:
            return self._get_dataloader(
                dataset=WithRow(dataset),
                description="Training",
                batch_size=self._train_batch_size,
                sampler_fn=lambda _: self._get_train_sampler(dataset),  # it may look at columns and lengths
                is_training=True,
            )
        finally:
            self.data_collator = whole

    def _collate(self, rows: list[Any]) -> Batch:
        collator = self._get_collator_with_removed_columns(self.data_collator, description="target")
        return self._prepare_inputs(collator(rows))

    def _targets(self) -> Targets:
        if self.target == "self":
            rows = self.train_dataset
            rows = self._remove_unused_columns(rows) if isinstance(rows, Dataset) else rows
            return OwnTargets(rows, self._collate, self.per_example_loss, batch_size=self.args.eval_batch_size)
        sets = {
            name: self._remove_unused_columns(rows) if isinstance(rows, Dataset) else rows
            for name, rows in self.target_sets.items()
        }
        return Targets(
            sets,
            self._collate,
            self.per_example_loss,
            batch_size=self.args.eval_batch_size,
            seed=self.args.seed,
        )

    def _check_batches(self) -> None:
        """Whether a batch of the training set and of each target set can be made, and has a loss that is known.

        Raises:
            ValueError: naming the set.
        """
        own_loss, label = self._has_own_loss, (self.label_names or ["labels"])[0]
        sets = {f"target_dataset: {name!r}": rows for name, rows in self.target_sets.items()}
        for name, rows in ({"train_dataset:": self.train_dataset} | sets).items():
            try:
                rows = self._remove_unused_columns(rows) if isinstance(rows, Dataset) else rows
                with torch.random.fork_rng(devices=[]):
                    batch = self._collate([rows[0]])
            except Exception as error:  # whatever a collator may raise
                raise ValueError(
                    f"{name} cannot be collated ({type(error).__name__}: {first_line(error)}); it needs the columns that training needs"
                ) from error
            if label not in batch:
                raise ValueError(
                    f"{name} gives batches without {label!r}; the dataset or the collator must provide it"
                )
            self.has_classes = not own_loss and self.problem(batch[label]) == CLASSES
            if batch[label].is_floating_point() and self.has_classes:
                raise ValueError(
                    f"{name} has labels that are no classes, and {type(self.model).__name__} takes them for classes; set its config's problem_type, or "
                    "override per_example_loss"
                )
            width, wanted = batch[label][0].numel(), getattr(getattr(self.model, "config", None), "num_labels", None)
            if not own_loss and not self.has_classes and width != wanted:
                raise ValueError(
                    f"{name} has {width} numbers in {label!r}, and the model answers with {wanted}; give each row as many as the model has num_labels"
                )

    # The step

    def training_step(self, model, inputs, num_items_in_batch=None):
        rows = inputs.pop(ROW)
        prepared = self._prepare_inputs(inputs)
        step, first = self.state.global_step, not self._micro
        weight = self._weights(prepared).float()
        # Both before the step is opened: what is covered says which gradients of targets are needed.
        if self._ghost is not None and self._wants_to_learn(
            first, len(rows) > self._ghost.learned and bool(weight.any())
        ):
            self._learn_rows(prepared, weight)
        if first and self._is_looked_at(step):
            self._normalised_by = self._check_loss(prepared, weight, num_items_in_batch, self._all_was_looked_at(step))
        if first:
            self._open_step(step)
        kept = random_states(self.args.device), dict(inputs)
        if self._ghost is not None and self._sees():
            self._ghost.start(len(rows), targets=self.target != "self", gram=self.target == "self")
        self._upstream = None
        try:
            with self._watched_loss(), seen_logits(self.model, with_gradient=self._weighs) as logits:
                loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            if self._ghost is not None:
                self._ghost.stop()
        if self._upstream is None:
            raise ValueError(
                "training_step: nothing was backwarded through compute_loss, so its examples cannot be seen; use a Trainer "
                "whose training_step calls it"
            )
        # h_i as the layers saw it is the example's share of what was backwarded: its own gradient times this.
        total = self._items_per_step(num_items_in_batch) if self._normalised_by == "step" else weight.sum()
        coefficient = self._upstream * weight / total
        if self._weighs:
            coefficient = self._shares(logits, prepared, coefficient)
            if coefficient is None:
                raise ValueError(
                    f"compute_loss: at step {step + 1} it is no sum of the examples' own losses any more; {LEAVE_OUT}"
                )
            weight = coefficient * total / self._upstream
        margin = margins(logits, prepared, (self.label_names or ["labels"])[0], weight)
        if self._ghost is not None:
            if self._sees():
                self._note_unseen()
                self._micro.append((rows, weight, self._observed(coefficient), margin))
            else:
                self._micro.append((rows, weight, weight.new_empty(0), margin))
        elif self._trajectory is not None:
            # The sweep takes the step again without the scaler, so its losses must not be scaled either.
            scale = self._loss_scale()
            self._trajectory.add(step, MicroBatch(kept[1], kept[0], rows, weight, coefficient / scale, margin))
            self._micro.append((rows, weight, weight.new_empty(0), margin))
        return loss

    def _wants_to_learn(self, first: bool, wants: bool) -> bool:
        """Where processes share the model, all or none; and not within an accumulation, the gradients of which have not been added up yet."""
        if not is_shared(self.model):
            return wants
        return first and bool(gather(torch.tensor([wants], device=self.args.device)).any())

    def _observed(self, coefficient: Tensor) -> Tensor:
        """What one micro-batch tells: `[batch, targets]`, or for `target="self"` the Gram matrix, of the examples' own losses."""
        size = coefficient.to(torch.float32)
        if self.target == "self":
            return self._ghost.gram / (size[:, None] * size[None, :])
        return self._ghost.dots / size[:, None]

    def _sees(self) -> bool:
        return self._target_gradients is not None or self.target == "self"

    def _open_step(self, step: int) -> None:
        if self._trajectory is not None:
            self._trajectory.before(step, self._flat_optimizer.state)
            self._settings = self._flat_optimizer.settings(self.args.max_grad_norm or 0.0)
        elif self.target != "self":
            has_moments = any("exp_avg_sq" in self._inner_optimizer.state[p] for p in self._parameters.values())
            if self.args.preconditioned and not has_moments:
                return  # before Adam's first step there is nothing to precondition with
            if self._target_gradients is None or step % self.args.target_every == 0:
                self._look_at_targets(step)

    def _look_at_targets(self, step: int) -> None:
        # The learning rate of the step comes on top when it closes, so only what differs between parameters goes into G: their
        # groups' rates relative to the leading one, and Adam's second moment. One look serves `target_every` steps of any schedule.
        covered, matrices, rank = self._ghost.covered, self._ghost.matrices, self.args.target_rank
        self._target_gradients = None  # both, before the next ones are made
        self._ghost.clear_targets()
        gradients: dict[str, Any] = self._gradients_of_targets(step)
        for name, parameter in covered.items():
            gradient = gradients[name]
            part = own(gradient)
            part.mul_(self._relative_rate(parameter))
            if self.args.preconditioned:
                part.div_(own(self._root_of_second_moment(parameter)))
            if rank is not None and name in matrices and rank * sum(parameter.shape) < parameter.numel():
                gradients[name] = low_rank(whole(gradient), rank)
            elif rank is not None:
                gradients[name] = gradient.clone()  # not a view, so that all else is freed
        self._target_gradients = gradients
        self._ghost.set_targets(gradients)

    def _gradients_of_targets(self, step: int) -> dict[str, Tensor]:
        """By name, `[targets, *shape]`, shared as the parameters are."""
        covered, drawn = self._ghost.covered, {"step": step, "examples": self.args.target_batch_size}
        if is_shared(self.model):
            with self._unnoticed():
                return self._target_sets.shared_gradients(self.model, covered, **drawn)
        flat = self._target_sets.gradients(self.model, list(covered.values()), **drawn)
        parts = flat.split([parameter.numel() for parameter in covered.values()], dim=1)
        return {
            name: part.view(-1, *parameter.shape)
            for (name, parameter), part in zip(covered.items(), parts, strict=True)
        }

    def _root_of_second_moment(self, parameter: Tensor) -> Tensor:
        """√v̂ + ε of Adam."""
        group = next(g for g in self._inner_optimizer.param_groups if any(p is parameter for p in g["params"]))
        state = self._inner_optimizer.state[parameter]
        if "exp_avg_sq" not in state:  # it never had a gradient, and does not move
            return torch.full_like(parameter, torch.inf)
        correction = 1 - group["betas"][1] ** float(state["step"])
        return (state["exp_avg_sq"] / correction).sqrt_().add_(group["eps"]).to(parameter.dtype)

    @property
    def _leading_group(self) -> dict[str, Any]:
        """The group of parameters with the largest learning rate; those of the others are relative to it."""
        return max(self._inner_optimizer.param_groups, key=_base_rate)

    def _relative_rate(self, parameter: Tensor) -> float:
        groups = self._inner_optimizer.param_groups
        group = next((group for group in groups if any(p is parameter for p in group["params"])), None)
        if group is None:  # the optimiser does not move it
            return 0.0
        leading = _base_rate(self._leading_group)
        return _base_rate(group) / leading if leading else 1.0

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        value = float(whole(norm) if isinstance(norm, Tensor) else norm)
        if not np.isfinite(value) and self._loss_scale() == 1.0:
            raise FloatingPointError(
                f"gradient is not finite at step {self.state.global_step + 1}: nothing was updated, and the records of the steps "
                "before it are kept; try a smaller learning_rate"
            )
        limit = self.args.max_grad_norm
        self._clipped = min(1.0, limit / (value + 1e-6)) if limit else 1.0
        return norm

    def _close_step(self) -> None:
        """After the optimiser's step: what was observed is worth η times the clip coefficient."""
        step, micro, self._micro = self.state.global_step, self._micro, []
        if self.accelerator.optimizer_step_was_skipped:
            return
        if not micro:
            raise ValueError(
                "training_step: a step was taken past the one that observes; call super().training_step in yours"
            )
        if self._trajectory is not None:
            self._trajectory.after(step, self._settings)
            return
        if not self._sees() or any(values.numel() == 0 for _, _, values, _ in micro):
            return
        learning_rate = float(self._leading_group["lr"])
        # A Gram matrix knows the pairs within a micro-batch only. Each stands for the whole step, of all processes, so the sums of
        # its weights are needed here; products with targets need no one else, and are joined as they are.
        if self.target == "self":
            sums = torch.stack([torch.stack([w.sum(), w.square().sum()]) for _, w, *_ in micro]).sum(0)
            sums = gather(sums[None]).sum(0) if self.args.world_size > 1 else sums
            micro = [_own(*part, *sums) for part in micro]
        rows, weight, values, margin = (torch.cat(parts) for parts in zip(*micro, strict=True))
        if self.args.world_size > 1:
            rows, weight, values, margin = (
                gather(pad_across_processes(part, pad_index=-1 if part is rows else 0))
                for part in (rows, weight, values, margin)
            )
        factor = learning_rate * self._clipped
        if self._weighs:  # what the examples' shares of the step come to, which otherwise is 1
            factor *= weight[rows >= 0].mean().item()
        if self.target == "self":
            values = values * values.new_tensor([factor, factor, factor**2])
        else:
            values = values * factor
        counted = (weight > 0) & (rows >= 0)
        if self.is_world_process_zero() and counted.any():
            self._recorder.add(step, rows[counted], weight[counted], values[counted], margin=margin[counted])

    def _note_unseen(self) -> None:
        """Once: which trainable parameters are not seen."""
        if self._noted:
            return
        self._noted = True
        unseen = dict(self._ghost.uncovered)
        for name in self._ghost.covered.keys() - self._ghost.recorded:
            unseen[name] = "it took no part, or was used behind its layer's back"
        mixing = self._ghost.mixes_examples
        parts = []
        if unseen:
            share = sum(self._parameters[name].numel() for name in unseen if name in self._parameters)
            whole = sum(p.numel() for p in self._parameters.values())
            listed = "; ".join(f"{name} ({why})" for name, why in list(unseen.items())[:5])
            more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
            parts.append(f"{100 * share / whole:.1f} % of the trainable parameters are not seen: {listed}{more}.")
            if self._recorder is not None:
                self._recorder.describe(unseen={"share": share / whole, "parameters": unseen})
        if mixing:
            parts.append(
                f"{len(mixing)} BatchNorm layers in train mode (first: {mixing[0]}) mix the examples of a batch: what is "
                "recorded is an example's share of the batch's gradient."
            )
        if parts:
            logger.warning("Influence: %s", " ".join(parts))


_LOSSES = {
    CLASSES: cross_entropy,
    "regression": squared_error,
    "multi_label_classification": binary_cross_entropy,
}


def _own(
    rows: Tensor, weight: Tensor, gram: Tensor, margin: Tensor, total: Tensor, squares: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The examples of a micro-batch that have predictions, and what it tells of the whole step that it is a part of: others are
    taken to be like those in it. `total` and `squares` are the sums of all weights of the step, and of their squares.
    """
    kept = weight > 0
    rows, weight, margin, values = rows[kept], weight[kept], margin[kept], own_gains(gram[kept][:, kept], weight[kept])
    if len(rows) < 2:  # as the recorder has it: one example alone tells nothing of others
        values[:, 2] = 0
        return rows, weight, values, margin
    own, mean, variance = values.unbind(1)
    here = weight.sum()
    others = (here * mean - weight * own) / (here - weight)
    mean = (weight * own + (total - weight) * others) / total
    variance = variance * (squares / total**2) / (weight.square().sum() / here**2)
    return rows, weight, torch.stack([own, mean, variance], dim=1), margin


@torch.no_grad()
def margins(logits: list[Tensor], inputs: Batch, label: str, weight: Tensor) -> Tensor:
    """`[batch]`: p of the label less p of the most probable other class; NaN where the model is no classifier with one label."""
    labels = inputs.get(label)
    unknown = torch.full_like(weight, torch.nan)
    if not logits or not isinstance(labels, Tensor) or labels.is_floating_point() or logits[0].dim() != 2:
        return unknown
    if labels.shape != logits[0].shape[:1] or logits[0].shape[1] < 2:
        return unknown
    p, own = logits[0].float().softmax(-1), labels.clamp(min=0)[:, None]
    margin = p.gather(1, own)[:, 0] - p.scatter(1, own, -1).amax(1)
    return torch.where(weight > 0, margin.to(weight), unknown)


def _base_rate(group: dict[str, Any]) -> float:
    """A group's learning rate before any schedule."""
    return float(group.get("initial_lr", group["lr"]))


def _predictions(labels: Tensor) -> Tensor:
    """How many of each example's labels count: `[batch]`."""
    return (labels != IGNORED).reshape(len(labels), -1).sum(1)
