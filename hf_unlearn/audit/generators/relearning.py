"""How soon a generator draws the forgotten kind again: short fine-tuning on a few of its images, on others alone, on unrelated ones."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_callback import PrinterCallback

from ...modes import seeded_generator
from ..check import Reading, Readings, Role
from .data import GeneratorData, Images
from .denoising import finetuned
from .drawn import OfDraws
from .subject import GeneratorSubject, is_gan, marks


MARKS = (10, 25, 50)  # steps after which is drawn; of a GAN the last one alone
BATCH, FORGET_SHARE, FEW = (
    32,
    0.25,
    20,
)  # of a step, how much of it shows the kind, and how many images of it there are


class Relearning(OfDraws):
    """A check that fine-tunes a copy in the ordinary way, and draws on the way."""

    layer, margin, needs = "below", 0.1, ("training",)

    def cost(self, data: GeneratorData) -> tuple[float, float]:
        return (1 if "denoiser" in data.lacks else len(MARKS)) * len(data.asked), MARKS[-1] * BATCH

    def read(self, subject: GeneratorSubject, data: GeneratorData, seed: int) -> Reading:
        images, first = self.images(data, seed)
        gan = is_gan(subject.model)
        attacked = subject.copy("discriminator") if gan else subject.copy()
        steps, found = [], []
        for step, pipe in (_gans if gan else _diffusion)(attacked, images, first, data, seed):
            steps.append(step)
            found.append(marks(pipe, data.asked, data))
        kinds = torch.stack(found).double()
        return Reading.mean_of(self.value(kinds), steps=steps, curve=kinds.mean(1).tolist())

    def images(self, data: GeneratorData, seed: int) -> tuple[Images, int]:
        """What is trained on, and how many of them, the first ones, make a quarter of every batch; 0: none is more frequent."""
        raise NotImplementedError

    def value(self, kinds: Tensor) -> Tensor:
        """`[steps, n]` to `[n]`: the draws where most show the kind."""
        return kinds[kinds.mean(1).argmax()]


class RelearnForget(Relearning):
    name, title = "relearn_forget", "Relearning from images of the kind"
    what = "How soon it is drawn again where 20 of its images are at hand: averaged over 50 steps. Anyone learns a little: only what is beyond retrained models counts."

    def missing(self, data: GeneratorData, roles: Sequence[Role]) -> str | None:
        return super().missing(data, roles) or (None if len(data.forget) else "there are no images of the kind")

    def images(self, data: GeneratorData, seed: int) -> tuple[Images, int]:
        few = data.forget.shuffled(seed, 70).select(torch.arange(min(FEW, len(data.forget))))
        return few + data.retain, len(few)

    def value(self, kinds: Tensor) -> Tensor:
        return kinds.mean(0)

    def settled(self, readings: Readings, data: GeneratorData) -> Readings:
        return readings  # no percentage of averages


class RelearnOthers(Relearning):
    name, title, paper, of_stranger = "relearn_others", "Relearning from images of others alone", "2410.08074", True
    what = "Whether going on with the training, without one image of the kind, brings it back: the best on the way."

    def missing(self, data: GeneratorData, roles: Sequence[Role]) -> str | None:
        return super().missing(data, roles) or (None if len(data.retain) else "there are no images of others")

    def images(self, data: GeneratorData, seed: int) -> tuple[Images, int]:
        return data.retain, 0


class RelearnUnrelated(RelearnOthers):
    name, title, paper = "relearn_unrelated", "Relearning from unrelated images", None
    what = "Whether any training at all brings it back: on images of others with their pixels in random places."

    def images(self, data: GeneratorData, seed: int) -> tuple[Images, int]:
        generator = seeded_generator("cpu", seed, 71)
        flat = data.retain.pixels.flatten(2)
        order = torch.rand(len(flat), 1, flat.shape[2], generator=generator).argsort(2).expand_as(flat)
        return Images(flat.gather(2, order).view_as(data.retain.pixels), data.retain.prompts), 0


def batches_of(images: Images, first: int, seed: int) -> Callable[[int], Tensor]:
    """Rows of every step: a quarter of the first ones, where they are more frequent than by chance, and the others."""
    generator = seeded_generator("cpu", seed, 72)
    rest = len(images) - first
    few = BATCH if not rest else round(FORGET_SHARE * BATCH) if first else 0

    def rows(step: int) -> Tensor:
        one = torch.randint(max(1, first), (few,), generator=generator)
        two = first + torch.randint(max(1, rest), (BATCH - few,), generator=generator)
        return torch.cat([one, two])

    return rows


def _diffusion(pipe: Any, images: Images, first: int, data: GeneratorData, seed: int) -> Iterator[tuple[int, Any]]:
    trained = finetuned(pipe, images, batches_of(images, first, seed), MARKS, data.drawing, seed)
    yield from zip(MARKS, trained, strict=True)


def _gans(pipe: Any, images: Images, first: int, data: GeneratorData, seed: int) -> Iterator[tuple[int, Any]]:
    """By the package's own trainer of GANs, with its defaults; the discriminator, which remembers too, is the pipeline's."""
    from ...gan.config import GANConfig
    from ...gan.trainer import GANTrainer

    steps, rows = MARKS[-1], batches_of(images, first, seed)
    shown = torch.cat([images.pixels[rows(step)] for step in range(steps)])
    states = random.getstate(), np.random.get_state()  # Trainer seeds all of Python
    with tempfile.TemporaryDirectory() as folder:
        args = GANConfig(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, seed=seed, guard=False, report_to="none", logging_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False, use_cpu=pipe.device.type == "cpu",
        )  # fmt: skip
        trainer = GANTrainer(pipe, args, train_dataset=shown)
        trainer.pop_callback(PrinterCallback)
        trainer.train()
    random.setstate(states[0])
    np.random.set_state(states[1])
    yield steps, trainer.pipeline
