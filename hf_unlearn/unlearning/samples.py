"""What a generator draws while it forgets: grids of samples, and the figures taken of them. All from the same noise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps
from torch import Tensor
from transformers import TrainerCallback

from ..diffusion import generate, is_prompted
from ..metrics.features import Features, features_of
from ..metrics.generation import frechet_distance, percentage_unlearned
from ..parameters import ReferencePoint


if TYPE_CHECKING:
    from .vdu import VDUTrainer


logger = logging.getLogger(__name__)

GRID_SEED, METRIC_SEED = 3, 4
SMALLEST = 64  # pixels; smaller images are enlarged, each pixel a square


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """One picture of images `[n, channels, height, width]` in [−1, 1], in rows of `columns` (default: a square)."""
    columns = columns or max(1, round(len(images) ** 0.5))
    images = images[: len(images) // columns * columns] if len(images) >= columns else images
    columns = min(columns, len(images))
    arrays = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in arrays]
    scale = max(1, -(-SMALLEST // pictures[0].width))
    pictures = [
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) for image in pictures
    ]
    framed = [ImageOps.expand(image.convert("RGB"), border=2, fill="#868e96") for image in pictures]
    return make_image_grid(framed, rows=len(framed) // columns, cols=columns)


def draw(trainer: VDUTrainer, count: int, seed: int) -> Tensor:
    """Samples of a trainer's model as it is now, by its settings; with prompts, of the forgotten and the kept ones in turn.

    Args:
        seed (`int`): of one use; the run's own seed is added. No random state changes.
    """
    args, prompts = trainer.args, trainer.sample_prompts
    return generate(
        trainer.pipeline.to(args.device),
        [prompts[i % len(prompts)] for i in range(count)] if is_prompted(trainer.pipeline) else count,
        seed=1000 * args.seed + seed,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        batch_size=args.sample_batch_size,
    )


class _DrawsAtTimes(TrainerCallback):
    """Draws before the first step, every `steps` optimiser steps, and after the last."""

    def __init__(self, trainer: VDUTrainer, steps: int | None):
        self.trainer, self.steps = trainer, steps

    def draw(self, count: int, seed: int) -> Tensor:
        return draw(self.trainer, count, seed)

    def look(self, step: int, stage: str) -> None:
        raise NotImplementedError

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.look(0, "before")

    def on_step_end(self, args, state, control, **kwargs):
        if self.steps and state.global_step % self.steps == 0:
            self.look(state.global_step, "during")

    def on_train_end(self, args, state, control, **kwargs):
        self.look(state.global_step, "after")


class SampleGrids(_DrawsAtTimes):
    """Grids in `_private/samples/`; the last one also in `pictures/`, which is published, the first one if `publish_before`."""

    def __init__(self, trainer: VDUTrainer):
        super().__init__(trainer, trainer.args.grid_steps)

    def look(self, step: int, stage: str) -> None:
        args = self.trainer.args
        if not args.should_save:
            return
        picture = grid(self.draw(args.grid_images, GRID_SEED))
        name = {"before": "before", "during": f"step-{step}", "after": "after"}[stage]
        folders = [self.trainer.private_dir / "samples"]
        if stage == "after" or (stage == "before" and args.publish_before):
            folders.append(Path(args.output_dir, "pictures"))
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{name}.png")


class PULCallback(_DrawsAtTimes):
    """Logs `pul`, the percentage unlearned: how many fewer samples a classifier calls forgotten than before the first step.

    Args:
        trainer (`VDUTrainer`): add the callback to it with `trainer.add_callback`.
        classify (callable): images `[n, channels, height, width]` in [−1, 1] to classes, int `[n]`.
        forgotten (`list[int]`): the forgotten classes.
        samples (`int`): images drawn each time.
        steps (`int`, *optional*): optimiser steps between two looks. Default: before and after.
    """

    def __init__(
        self,
        trainer: VDUTrainer,
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
            model = self.trainer.model
            now = ReferencePoint.capture(model)
            self.trainer.reference.restore(model)  # a resumed run does not begin as the original
            self.before = self._classes()
            now.restore(model)
            percentage_unlearned(
                self.before, self.before, self.forgotten
            )  # refuses now where nothing is there to forget

    def look(self, step: int, stage: str) -> None:
        result = percentage_unlearned(self.before, self._classes(), self.forgotten)
        self.trainer.log({"pul": result.pul, "pul_low": result.low, "pul_high": result.high})

    def _classes(self) -> Tensor:
        return torch.as_tensor(self.classify(self.draw(self.samples, METRIC_SEED))).cpu()


class FIDCallback(_DrawsAtTimes):
    """Logs `fid`, the Fréchet distance of samples to a reference: to real data without what is to be forgotten it is u-FID.

    Args:
        trainer (`VDUTrainer`): add the callback to it with `trainer.add_callback`.
        reference ([`~hf_unlearn.metrics.features.Features`]): of the reference images.
        extractor (callable): what they were computed with; its name must be the same.
        samples (`int`): images drawn each time; FIDs compare only at equal sizes.
        steps (`int`, *optional*): optimiser steps between two looks. Default: before and after.
    """

    def __init__(
        self,
        trainer: VDUTrainer,
        reference: Features,
        extractor: Callable[[Tensor], Tensor],
        *,
        samples: int = 256,
        steps: int | None = None,
    ):
        super().__init__(trainer, steps)
        self.reference, self.extractor, self.samples = reference, extractor, samples

    def look(self, step: int, stage: str) -> None:
        images = self.draw(self.samples, METRIC_SEED)
        drawn = features_of(images, self.extractor, name=self.reference.extractor)
        self.trainer.log({"fid": frechet_distance(self.reference, drawn).distance})
