"""What a step of unlearning a GAN costs: a plain step of GANTrainer, stage 2 of the paper's objective, and our defaults.

    python benchmarks/gan_cost.py [--quick]

Both turns, the optimiser and the average, interleaved round by round, medians of the rounds' ratios to the plain step; memory as in
step_cost.py. Every step shows the discriminator 64 images as real and 64 as drawn, and draws 64 for the generator; every fourth has
the penalty R1, for all of them at once.
"""

from __future__ import annotations

from pathlib import Path

import torch
from step_cost import Steps, compare

from hf_unlearn import (
    AdaptThenUnlearnConfig,
    AdaptThenUnlearnTrainer,
    DCGANDiscriminator,
    DCGANGenerator,
    GANConfig,
    GANPipeline,
    GANTrainer,
)


HERE = Path(__file__).parent
WORKLOADS = {  # name: (image side, channels of the finest map)
    "digits GAN, 8 × 8": (8, 32),
    "Fashion-MNIST GAN, 16 × 16": (16, 32),
}
BATCH = 64
COMMON = {
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "max_steps": 1,
    "learning_rate": 1e-6,
    "per_device_train_batch_size": BATCH,
    "guard": False,
    "use_cpu": True,
}


class GANSteps(Steps):
    """Steps that go on counting, so that the penalty comes when it is due."""

    def step(self) -> None:
        super().step()
        self.trainer.average()
        self.trainer.state.global_step += 1

    def held(self) -> int:
        anchor, undesired = self.trainer.anchor, getattr(self.trainer, "_negatives", None)
        tensors = [] if anchor is None else list(anchor.mean.values())
        return sum(tensor.nbytes for tensor in (*tensors, *([] if undesired is None else [undesired])))


def pipeline(side: int, channels: int) -> GANPipeline:
    torch.manual_seed(0)
    shape = {"sample_size": side, "base_channels": channels}
    return GANPipeline(DCGANGenerator(**shape), DCGANDiscriminator(**shape))


def steppers(side: int, channels: int, folder: str) -> dict[str, Steps]:
    images = torch.rand(1_000, 1, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = {"pixel_values": images[:BATCH]}
    plain = GANTrainer(pipeline(side, channels), GANConfig(f"{folder}/plain", **COMMON), train_dataset=images)
    out = {"plain GAN training": GANSteps(plain, batch)}
    settings = COMMON | {"grid_images": 0, "adapt_steps": 1, "fisher_samples": 2, "own_samples": 0}
    for name, own in (("stage 2, EL2 repulsion", {"negative_share": 0.0}), ("stage 2, our defaults", {})):
        trainer = AdaptThenUnlearnTrainer(
            pipeline(side, channels),
            AdaptThenUnlearnConfig(f"{folder}/{len(out)}", **(settings | own)),
            undesired=images[:100],
            clean=images[100:],
        )
        out[name] = GANSteps(trainer, batch)
    return out


if __name__ == "__main__":
    compare("gan_cost", __doc__, WORKLOADS, steppers, 120)
