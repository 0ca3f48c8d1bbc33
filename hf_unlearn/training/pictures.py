"""What a generator draws while it forgets: grids of samples, and the figures taken of them. All from the same noise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..files import kept_private
from ..images import grid
from ..metrics.features import FeatureMoments, Features, features_of
from ..metrics.generation import frechet_distance, percentage_unlearned
from ..parameters.sharding import is_shared
from .trackers import Trackers, log_beside


logger = logging.getLogger(__name__)

GRID_SEED, METRIC_SEED = 3, 4


class Draws(Protocol):
    """A trainer of a generator."""

    args: Any
    model: nn.Module
    private_dir: Path
    trackers: Trackers

    def draw(self, count: int, seed: int) -> Tensor: ...
    def as_original(self) -> AbstractContextManager[None]: ...
    def log(self, logs: dict[str, float]) -> None: ...


class _DrawsAtTimes(TrainerCallback):
    """Draws before the first step, every `steps` optimiser steps, and after the last."""

    def __init__(self, trainer: Draws, steps: int | None):
        self.trainer, self.steps = trainer, steps

    def look(self, step: int, stage: str) -> None:
        raise NotImplementedError

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            with self.trainer.as_original():  # a run may begin as something else
                self.look(0, "before")

    def on_step_end(self, args, state, control, **kwargs):
        if self.steps and state.global_step % self.steps == 0:
            self.look(state.global_step, "during")

    def on_train_end(self, args, state, control, **kwargs):
        self.look(state.global_step, "after")


class SampleGrids(_DrawsAtTimes):
    """Grids in `_private/samples/`; the last one also in `pictures/`, which is published, the first one if `publish_before`. Trackers get
    them too; those that do not stay on this machine only what may be published.
    """

    def __init__(self, trainer: Draws):
        super().__init__(trainer, trainer.args.grid_steps)

    def look(self, step: int, stage: str) -> None:
        args = self.trainer.args
        if not (args.should_save or is_shared(self.trainer.model)):
            return
        drawn = self.trainer.draw(args.grid_images, GRID_SEED)  # processes that share the model draw together
        if not args.should_save:
            return
        picture = grid(drawn)
        name = {"before": "before", "during": f"step-{step}", "after": "after"}[stage]
        folders = [self.trainer.private_dir / "samples"]
        if stage == "after" or (stage == "before" and args.publish_before):
            folders.append(Path(args.output_dir, "pictures"))
        for folder in folders:
            with kept_private(folder / f"{name}.png") as file:
                picture.save(file)
        self.trainer.trackers.picture("samples", picture, private=len(folders) < 2)


class PULCallback(_DrawsAtTimes):
    """Logs `pul`, the percentage unlearned: how many fewer samples a classifier calls forgotten than before the first step.

    Args:
        trainer (`VDUTrainer` or `AdaptThenUnlearnTrainer`): add the callback to it with `trainer.add_callback`.
        classify (callable): images `[n, channels, height, width]` in [−1, 1] to classes, int `[n]`.
        forgotten (`list[int]`): the forgotten classes.
        samples (`int`): images drawn each time.
        steps (`int`, *optional*): optimiser steps between two looks. Default: before and after.
    """

    def __init__(
        self,
        trainer: Draws,
        classify: Callable[[Tensor], Tensor],
        forgotten: list[int],
        *,
        samples: int = 256,
        steps: int | None = None,
    ):
        super().__init__(trainer, steps)
        self.classify, self.forgotten, self.samples = classify, forgotten, samples
        self.before: Tensor | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.before is None:
            with self.trainer.as_original():  # a resumed run does not begin as the original
                self.before = self._classes()
            # Refuses now where nothing is there to forget.
            percentage_unlearned(self.before, self.before, self.forgotten)

    def look(self, step: int, stage: str) -> None:
        result = percentage_unlearned(self.before, self._classes(), self.forgotten)
        log_beside(self.trainer, {"pul": result.pul, "pul_low": result.low, "pul_high": result.high})

    def _classes(self) -> Tensor:
        return torch.as_tensor(self.classify(self.trainer.draw(self.samples, METRIC_SEED))).cpu()


class FIDCallback(_DrawsAtTimes):
    """Logs `fid`, the Fréchet distance of samples to a reference: to real data without what is to be forgotten it is u-FID.

    Args:
        trainer (`VDUTrainer` or `AdaptThenUnlearnTrainer`): add the callback to it with `trainer.add_callback`.
        reference ([`~hf_unlearn.metrics.features.Features`] or [`~hf_unlearn.metrics.features.FeatureMoments`]): of the reference images.
        extractor (callable): what they were computed with; its name must be the same.
        samples (`int`): images drawn each time; FIDs compare only at equal sizes.
        steps (`int`, *optional*): optimiser steps between two looks. Default: before and after.
    """

    def __init__(
        self,
        trainer: Draws,
        reference: Features | FeatureMoments,
        extractor: Callable[[Tensor], Tensor],
        *,
        samples: int = 256,
        steps: int | None = None,
    ):
        super().__init__(trainer, steps)
        self.reference, self.extractor, self.samples = reference, extractor, samples

    def look(self, step: int, stage: str) -> None:
        images = self.trainer.draw(self.samples, METRIC_SEED)
        drawn = features_of(images, self.extractor, name=self.reference.extractor, value_range=(-1, 1))
        log_beside(self.trainer, {"fid": frechet_distance(self.reference, drawn).distance})
