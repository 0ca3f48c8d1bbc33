"""What a run's trackers (`report_to`: TensorBoard, trackio, Weights & Biases) get besides the scalars that Trainer logs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import Trainer

KINDS = (TensorBoardCallback, TrackioCallback, WandbCallback)


def log_beside(trainer: Trainer, figures: dict[str, float]) -> None:
    """`trainer.log`, from within a step: the losses that are due at it are still logged, which else took this for theirs."""
    due = trainer.control.should_log
    trainer.log(figures)
    trainer.control.should_log = due


class Trackers(TrainerCallback):
    """Hands figures and pictures to the trackers of a trainer, each by its own call.

    Trackers end their run when they hear that training ends, and the callbacks that draw, look or go back to an earlier state then are
    told after them. So they are told last: what is seen at the end stands in the same run.

    Args:
        trainer (`Trainer`): whose `report_to` says which.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        for tracker in self.active:
            if isinstance(tracker, TensorBoardCallback):
                tracker.on_train_begin = partial(_begun, tracker.on_train_begin)

    @property
    def active(self) -> list[TrainerCallback]:
        """Those of the kinds that are known here."""
        return [callback for callback in self.trainer.callback_handler.callbacks if isinstance(callback, KINDS)]

    def _told(self, *, last: bool) -> None:
        # A new list: the event that is being told goes through the old one.
        handler, active = self.trainer.callback_handler, self.active
        others = [callback for callback in handler.callbacks if callback not in active]
        handler.callbacks = [*others, *active] if last else [*active, *others]

    def on_train_begin(self, args, state, control, **kwargs):
        self._told(last=True)

    def on_train_end(self, args, state, control, **kwargs):
        self._told(last=False)  # where a second run begins, they begin first

    def figures(self, values: Mapping[str, float]) -> None:
        """Scalars of this step, for trackers alone: neither printed nor kept in `log_history`. What is not finite is left out.

        Args:
            values (`Mapping[str, float]`): by name.
        """
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        for tracker in self.active if finite else ():
            trainer = self.trainer
            tracker.on_log(trainer.args, trainer.state, trainer.control, logs=dict(finite), model=trainer.model)

    def picture(self, name: str, image: Image, *, private: bool = False) -> None:
        """A picture of this step.

        Args:
            name (`str`): of the row of pictures.
            image (`PIL.Image.Image`): in colours.
            private (`bool`, defaults to `False`): shows what is to be forgotten: only for trackers that keep it on this machine.
        """
        step = self.trainer.state.global_step
        if not self.trainer.state.is_world_process_zero:
            return
        for tracker in self.active:
            if private and not stays_here(tracker):
                continue
            if isinstance(tracker, TensorBoardCallback):
                if tracker.tb_writer is not None:
                    pixels = np.asarray(image.convert("RGB"))
                    tracker.tb_writer.add_image(f"train/{name}", pixels, step, dataformats="HWC")
                    tracker.tb_writer.flush()
                continue
            module = tracker._trackio if isinstance(tracker, TrackioCallback) else tracker._wandb
            shown = module.Image(image.convert("RGB"), caption=f"step {step}")
            module.log({f"train/{name}": shown, "train/global_step": step})


def _begun(begin: Callable[..., None], args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
    # transformers 5.23 asks the config of a model for a method that those of diffusers have not, and the run ends before it begins.
    if hasattr(getattr(model, "config", None), "to_json_string"):
        kwargs["model"] = model
    begin(args, state, control, **kwargs)


def stays_here(tracker: TrainerCallback) -> bool:
    """Whether what a tracker is given stays on this machine, as far as can be told."""
    if isinstance(tracker, WandbCallback):
        return os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    if isinstance(tracker, TrackioCallback):
        return tracker._space_id is None and not os.environ.get("TRACKIO_SERVER_URL")
    return True
