"""What an unlearning trainer of a GAN writes: a pipeline without its discriminator, and a card that says how it was made."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from ...files import kept_private
from ...gan.config import GANConfig
from ...hub.loading import diffusion_task, loading_code
from ...hub.publish import forget_local_paths
from ...training.publishing import PublishingMixin


RUN_SETTINGS = ("learning_rate", "max_steps", "per_device_train_batch_size", "r1_weight", "r1_every", "ema_decay")
UNTOLD = ("grid_images", "grid_steps", "publish_before", "save_discriminator")


class GANPublishingMixin(PublishingMixin):
    """Saving, card and push of an unlearning trainer of a GAN."""

    def save_pipeline(self, folder: Path) -> None:
        """The generator. The discriminator has seen what was forgotten, so it stays in `_private/` unless the run says else."""
        discriminator = self.pipeline.discriminator
        if not self.args.save_discriminator:
            with kept_private(self.private_dir / "discriminator") as apart:
                discriminator.save_pretrained(apart)
                forget_local_paths(apart)
            self.pipeline.register_modules(discriminator=None)
        try:
            super().save_pipeline(folder)
        finally:
            self.pipeline.register_modules(discriminator=discriminator)

    def _forgotten(self) -> str:
        return f"what {len(self.source_dataset):,} marked samples show"

    def _chosen(self) -> dict[str, Any]:
        own = {f.name for f in fields(self.args)} - {f.name for f in fields(GANConfig)}
        names = sorted(own.difference(UNTOLD).union(RUN_SETTINGS))
        chosen = {name: getattr(self.args, name) for name in names}
        return chosen | {
            "clean": len(self.feedback.clean),
            "repulsion_weight": self.repulsion_weight,
            "repulsion_rate": self.repulsion_rate,
        }

    def _card_defaults(self, name: str) -> dict[str, Any]:
        return {
            "library_name": "hf_unlearn",
            "pipeline_tag": diffusion_task(type(self.pipeline)),
            "load_snippet": loading_code(type(self.pipeline), name),
        }

    @property
    def failed_checks(self) -> list[str]:
        """What went wrong in a run that ended, a line each, for the card."""
        collapsed = self.guard.collapsed if self.guard else None
        still_drawn = [self.still_drawn] if self.still_drawn else []
        if collapsed is None:
            return still_drawn
        kept = "no state before it was healthy" if self.guard.healthy is None else f"kept is step {self.guard.healthy}"
        failed = [f"Mode collapse at step {collapsed.step}: {100 * collapsed.coverage:.0f} % coverage; {kept}."]
        if self.guard.healthy == 0:
            failed.append("Nothing was unlearned: what is kept is the original.")
        return failed + still_drawn

    @property
    def passed_checks(self) -> list[str]:
        """What the guard against collapse saw, a line, for the card."""
        if not self.guard or self.guard.collapsed or not self._steps_taken:
            return []
        return ["No mode collapse was seen."]

    @property
    def _steps_taken(self) -> int:
        collapsed = self.guard.collapsed if self.guard else None
        return self.guard.healthy if collapsed and self.guard.healthy is not None else self.state.global_step
