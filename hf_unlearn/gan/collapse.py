"""Looks for mode collapse while a GAN trains, and goes back to the state before it."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import broadcast
from safetensors import safe_open
from torch import Tensor
from transformers import TrainerCallback

from ..files import load_tensors, read_json, save_tensors, undamaged, write_json
from ..metrics.features import Features
from ..metrics.generation import density_coverage
from ..training.outcome import tell_outcome
from ..training.trackers import Trackers


logger = logging.getLogger(__name__)

LOOKS = "guard.json"
HEALTHY = 0.75  # share of the best coverage above which a state is kept to go back to
LEARNED = 0.1  # coverage below which there is nothing to lose yet
REAL_SEED, DRAWN_SEED = 7, 8


@dataclass(frozen=True)
class Coverage:
    """What the guard saw: the share of real images that have a drawn one near (arXiv 2002.09797), in [0, 1], at a step."""

    step: int
    coverage: float


class Draws(Protocol):
    """What the guard needs of a trainer."""

    args: Any
    train_dataset: Any
    private_dir: Path
    trackers: Trackers

    def draw(self, count: int, seed: int) -> Tensor: ...
    def real_images(self, dataset: Any, count: int, seed: int) -> Tensor: ...
    def features(self, images: Tensor) -> Features: ...
    def players(self) -> dict[str, Tensor]: ...
    def load_players(self, state: dict[str, Tensor]) -> None: ...


class CollapseGuard(TrainerCallback):
    """Draws every `guard_steps` steps, always from the same latents, and asks how much of the training images is covered.

    Training stops, with a warning that names it, when coverage falls below `collapse_tolerance` times the best one seen; the
    latest state that had three quarters of the best comes back. A generator that has learnt nothing yet is left alone.
    Looking changes nothing: no weight, no random state.

    Args:
        trainer (`GANTrainer`): what trains.
    """

    def __init__(self, trainer: Draws):
        self.trainer = trainer
        self.real: Features | None = None
        self.begin()

    def begin(self) -> None:
        """Forget earlier runs."""
        self.looks: list[Coverage] = []
        self.healthy: int | None = None  # step of the state that is kept
        self.collapsed: Coverage | None = None

    @property
    def best(self) -> float:
        return max((look.coverage for look in self.looks), default=0.0)

    @property
    def _file(self) -> Path:
        return self.trainer.private_dir / "guard" / "healthy.safetensors"

    def on_train_begin(self, args, state, control, **kwargs):
        if not self.looks:
            self._look(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        every = args.guard_steps or max(1, state.max_steps // 10)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self._look(state.global_step)
            if self.collapsed:
                control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self.collapsed and self.healthy is not None:
            self.keep_healthy()
        elif not self.collapsed:  # a collapse was told of when it was seen
            tell_outcome(self.trainer, f"{type(self.trainer).__name__}, {state.global_step:,} steps: {self.summary}")

    @property
    def summary(self) -> str:
        """What was seen, in one sentence."""
        first, last, best = self.looks[0], self.looks[-1], max(self.looks, key=lambda look: look.coverage)
        return (
            f"what is drawn covers {100 * last.coverage:.0f} % of the training images ({100 * first.coverage:.0f} % at step "
            f"{first.step:,}, at best {100 * best.coverage:.0f} % at step {best.step:,})"
        )

    def _look(self, step: int) -> None:
        trainer = self.trainer
        if self.real is None:
            self.real = trainer.features(
                trainer.real_images(trainer.train_dataset, trainer.args.guard_examples, REAL_SEED)
            )
        drawn = trainer.features(trainer.draw(trainer.args.guard_examples, DRAWN_SEED))
        k = min(5, len(self.real) - 1)
        coverage = torch.tensor(
            density_coverage(self.real, drawn, k=k).coverage if k else 1.0, device=trainer.args.device
        )
        if trainer.args.world_size > 1:  # rounding must not part the ranks
            coverage = broadcast(coverage)
        look = Coverage(step, coverage.item())
        best = self.best
        self.looks.append(look)
        trainer.trackers.figures({"guard_coverage": look.coverage})
        if best >= LEARNED and look.coverage < trainer.args.collapse_tolerance * best:
            self.collapsed = look
            logger.warning(
                "mode collapse at step %d: what is drawn covers %.0f %% of the images, %.0f %% before; %s",
                step,
                100 * look.coverage,
                100 * best,
                "nothing to go back to" if self.healthy is None else f"going back to step {self.healthy}",
            )
        elif look.coverage >= HEALTHY * max(best, look.coverage):
            self.healthy = step
            if trainer.args.should_save:
                save_tensors(trainer.players(), self._file, {"step": str(step)})

    def keep_healthy(self) -> int | None:
        """Go back to the latest healthy state; its step, or None where there is none."""
        if self.healthy is None or not self._file.is_file():
            return None
        self.trainer.load_players(load_tensors(self._file, self.trainer.args.device))
        return self.healthy

    def save(self, checkpoint: Path) -> None:
        """What a resumed run needs to know."""
        looks, collapsed = [asdict(look) for look in self.looks], self.collapsed and asdict(self.collapsed)
        write_json({"looks": looks, "collapsed": collapsed}, checkpoint / LOOKS)

    def load(self, checkpoint: Path) -> None:
        """Read what [`~CollapseGuard.save`] wrote, where it is there; the healthy state may be newer, or gone."""
        self.begin()
        file = checkpoint / LOOKS
        if file.is_file():
            saved = read_json(file)
            self.looks = [Coverage(**look) for look in saved["looks"]]
            self.collapsed = Coverage(**saved["collapsed"]) if saved["collapsed"] else None
        if self._file.is_file():
            with undamaged(self._file), safe_open(self._file, "pt") as state:
                self.healthy = int(state.metadata()["step"])
