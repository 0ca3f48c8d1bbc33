"""The guard: stops when the model has forgotten, and restores the best state when utility falls."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import TrainerCallback

from ..modes import looking
from ..parameters.reference import ReferencePoint
from ..training.losses import IGNORED, mean_of_counted
from ..training.trackers import Trackers
from .objective import Batch


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Look:
    """What the guard saw at one step.

    Attributes:
        step (`int`): optimiser steps done.
        remembered (`float`): how far from forgotten: accuracy on the forget set above its target, or nats of loss below
            the held-out loss; ≤ 0 means forgotten. Infinite where no target is known.
        utility_drop (`float`): what the model lost elsewhere, in the unit of `utility_tolerance`.
        kept (`bool`): the drop is within tolerance.
    """

    step: int
    remembered: float
    utility_drop: float
    kept: bool

    @property
    def forgotten(self) -> bool:
        return self.remembered <= 0

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """Larger is better: a kept state before any other, a forgotten one before that, then the better utility."""
        return self.kept, self.forgotten, -self.utility_drop if self.forgotten else -self.remembered


@dataclass
class GuardState:
    """What a resumed run needs to know; written to every checkpoint."""

    baseline: float | None = None
    best: Look | None = None
    without_gain: int = 0
    looks: list[Look] = field(default_factory=list)

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, state: dict) -> GuardState:
        looks = [Look(**look) for look in state["looks"]]
        return cls(state["baseline"], state["best"] and Look(**state["best"]), state["without_gain"], looks)


class Watched(Protocol):
    """What the guard needs of a trainer."""

    args: Any
    model: nn.Module
    private_dir: Path
    utility_tolerance: float
    nothing_to_forget: str
    guard_steps: int | None
    latest_is_best: bool
    trackers: Trackers

    def remembered(self) -> float: ...
    def utility(self) -> float: ...
    def utility_drop(self, baseline: float) -> float: ...


class Guard(TrainerCallback):
    """Looks at forgetting and utility every `guard_steps` steps (default: every epoch).

    Training stops after `guard_patience` looks in a row that bring nothing: the model has forgotten and its utility no
    longer rises, or its utility stays more than `utility_tolerance` below where it began (a language model without a
    forget target is given the time to regain it). At the end the best state seen
    is restored from disk: forgotten, within tolerance, with the highest utility; if none was, the one within tolerance
    that remembers least, with a warning. Looking changes nothing: no weight, no random state.

    Args:
        trainer ([`Watched`]): an unlearning trainer.
    """

    def __init__(self, trainer: Watched):
        self.trainer = trainer
        self.state = GuardState()

    @property
    def looks(self) -> list[Look]:
        """Everything seen so far, in order."""
        return self.state.looks

    @property
    def best(self) -> Look | None:
        return self.state.best

    def _file(self, step: int) -> Path:
        return self.trainer.private_dir / "guard" / f"step-{step}.safetensors"

    @property
    def exhausted(self) -> bool:
        """Looking on would bring nothing."""
        return self.state.without_gain >= self.trainer.args.guard_patience

    def on_train_begin(self, args, state, control, **kwargs):
        if not self.looks:
            first = self.state.baseline is None
            if first:
                self.state.baseline = self.trainer.utility()
            # The model as it is against itself: 0, or NaN where its utility is none.
            self._look(state.global_step, self.state.baseline - self.state.baseline if first else None)
            if first and self.best.forgotten:
                logger.warning("forgotten before the first step: %s", self.trainer.nothing_to_forget)

    def on_step_end(self, args, state, control, **kwargs):
        # Also at the end of an epoch here and not in on_epoch_end, which comes after a checkpoint of the same step: a run
        # that goes on from that checkpoint would miss the look.
        every = self.trainer.guard_steps
        if state.global_step % every == 0 if every else float(state.epoch).is_integer():
            self._look(state.global_step)
            control.should_training_stop |= self.exhausted

    def on_save(self, args, state, control, **kwargs):
        self._drop_superseded()  # what an older checkpoint would have gone back to; now there is a newer one

    def _drop_superseded(self) -> None:
        if self.trainer.args.should_save:
            for file in self._file(0).parent.glob("step-*.safetensors"):
                if file != self._file(self.best.step):
                    file.unlink()

    def on_train_end(self, args, state, control, **kwargs):
        if not self.exhausted and self.looks[-1].step < state.global_step:
            self._look(state.global_step)
        done = []
        if self.exhausted and state.global_step < state.max_steps:
            why = "no gain" if self.looks[-1].kept else "too low a utility"
            done.append(
                f"ended the run at step {state.global_step} of {state.max_steps} ({args.guard_patience} looks: {why})"
            )
        if self.best.step < state.global_step:
            self._restore()
            done.append(f"restored step {self.best.step} of {state.global_step}")
        if done and state.is_world_process_zero:
            kept = f"utility drop {self.best.utility_drop:.3g} (tolerance {self.trainer.utility_tolerance:g})"
            if math.isfinite(self.best.remembered):
                kept += f", {max(self.best.remembered, 0.0):.3g} above the forget target"
            logger.warning("the guard %s: %s", " and ".join(done), kept)

    def _look(self, step: int, drop: float | None = None) -> None:
        drop = self.trainer.utility_drop(self.state.baseline) if drop is None else drop
        look = Look(step, self.trainer.remembered(), drop, drop <= self.trainer.utility_tolerance)
        self.state.looks.append(look)
        self.trainer.trackers.figures({"guard_remembered": look.remembered, "guard_utility_drop": drop})
        # Without a forget target (language models with no held-out loss) there is no state to prefer but the latest kept; and a loss
        # that has a minimum is best where it was minimised longest.
        latest = self.trainer.latest_is_best or look.remembered == float("inf")
        gained = self.best is None or look.rank > self.best.rank or (latest and look.kept)
        if gained:
            self.state.best = look
            point = ReferencePoint.capture(self.trainer.model, copy=False)
            point.save(self._file(step), write=self.trainer.args.should_save)
            if self.trainer.args.save_strategy == "no":
                self._drop_superseded()
        # A language model that forgets by NPO loses utility first and gains it back later: without a target, no reason to stop.
        waiting = not gained and not latest and (look.forgotten or not look.kept)
        self.state.without_gain = self.state.without_gain + 1 if waiting else 0

    def _restore(self) -> None:
        model, args, file = self.trainer.model, self.trainer.args, self._file(self.best.step)
        there = torch.tensor(int(file.exists()), device=args.device)
        if broadcast(there):
            point = ReferencePoint.load(file, args.device) if args.process_index == 0 else None
            ReferencePoint.restore_of_first(point, model)
        else:
            logger.warning("the best state, of step %d, is gone from %s; keeping the last one", self.best.step, file)
            self.state.best = replace(self.looks[-1])
            for buffer in model.buffers():  # statistics are each process's own until then
                buffer.copy_(broadcast(buffer.clone()))


DEFAULT_TOLERANCE = {"accuracy": 0.02, "loss": 0.1, "divergence": 0.5}


LOOKING = 2**31  # a key for random numbers that no training step has


class UtilityMixin:
    """Forgetting and utility of the model as it is, measured without disturbing the run."""

    # Forgetting and utility, as the guard sees them

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Eval mode, no gradients, and afterwards the random state and training flags of before."""
        with looking(self.model):
            yield

    @property
    def _random_devices(self) -> list[torch.device]:
        return [self.args.device] if self.args.device.type == "cuda" else []

    def mean_of(self, function: Callable[[Batch], Tensor], dataset) -> float:
        """Mean of a per-example quantity; under several processes all get the first one's number."""
        return self._means((function,), dataset)[0]

    def _means(self, functions: Sequence[Callable[[Batch], Tensor]], dataset) -> list[float]:
        """Those of several, over which the examples are read once."""
        with self._looking():
            batches = self._batches(dataset, self.args.guard_examples)
            values = zip(*([function(batch).float() for function in functions] for batch in batches), strict=True)
            means = torch.stack([torch.cat(parts).mean() for parts in values])
        return broadcast(means).tolist()

    def correct(self, model: Callable, batch: Batch) -> Tensor:
        """Whether every prediction of an example that counts is right: `[batch]`, bool."""
        logits, targets = self.counted(model, batch)
        wrong = logits.argmax(-1) != targets[targets != IGNORED]
        return mean_of_counted(wrong.float(), targets) == 0

    def remembered(self) -> float:
        """How far from forgotten: accuracy above its target, or nats of loss below the held-out loss. ≤ 0: forgotten."""
        if self.args.forget == "class":
            known = self.mean_of(lambda batch: self.correct(self.model, batch), self.forget_dataset)
            return self.above_target(known=known)
        if self.heldout_loss is None:
            return math.inf
        loss = self.mean_of(lambda batch: self.task_loss(self.model, batch), self.forget_dataset)
        return self.above_target(loss=loss)

    def above_target(self, known: float = math.nan, loss: float = math.nan, **others: float) -> float:
        """`remembered` of an accuracy and a mean loss on the forget set; infinite where no target is known."""
        if self.args.forget == "class":
            return known - self.args.forget_accuracy
        if self.heldout_loss is None:
            return math.inf
        return 0.95 * self.heldout_loss - loss  # the two are means of finite samples: they need not agree to the digit

    latest_is_best = False

    @property
    def guard_steps(self) -> int | None:
        """Steps between two looks; None for an epoch."""
        return self.args.guard_steps

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

    @property
    def has_utility(self) -> bool:
        """Whether there is anything to judge utility by without a guard: data to keep, or replay."""
        return self.utility_kind != "divergence" or self.replay_weight > 0

    def utility(self, model: Callable | None = None) -> float:
        """The figure that utility is judged by; its unit is that of `utility_kind`. Of the model as it is, or of another."""
        model = self.model if model is None else model
        if self.utility_kind == "accuracy":
            return self.mean_of(lambda batch: self.correct(model, batch), self._utility_dataset)
        if self.utility_kind == "loss":
            return self.mean_of(lambda batch: self.task_loss(model, batch), self._utility_dataset)
        generator = self._generator(LOOKING)  # the same replay inputs at every look
        return self.mean_of(
            lambda batch: self.replay_loss(model, self.replay_inputs(batch, generator)), self._utility_dataset
        )

    def utility_drop(self, baseline: float) -> float:
        """What was lost since `baseline`: points of accuracy, nats that the loss rose by, or nats of divergence."""
        now = self.utility()
        return baseline - now if self.utility_kind == "accuracy" else now - baseline
