"""What a step of diffusion unlearning costs: a plain training step, the paper preset and our defaults, side by side.

    python benchmarks/diffusion_cost.py [--quick]

The trainers' own `training_step`, clipping and optimiser step, interleaved round by round, medians of the rounds' ratios to the plain
one; memory as in step_cost.py. A plain step denoises 64 images. So does a step of the paper preset (64 forget images), and one of our
defaults (32 forget images and 32 of the original's own samples).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from step_cost import Steps, compare
from torch import Tensor
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments

from hf_unlearn import VDUConfig, VDUTrainer
from hf_unlearn.training.noise import NoiseSchedule
from hf_unlearn.unlearning.diffusion.encoded import EncodedImages


HERE = Path(__file__).parent
WORKLOADS = {  # name: (image side, channels of the levels)
    "digits U-Net, 8 × 8": (8, (24, 48)),
    "U-Net, 16 × 16": (16, (32, 64)),
}
BATCH, BANK = 64, 1000
COMMON = {
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "max_steps": 1,
    "learning_rate": 1e-6,
    "use_cpu": True,
}


class PlainTrainer(Trainer):
    """The usual training loop of a DDPM: noise, one forward pass, mean squared error."""

    schedule: NoiseSchedule

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
        clean = inputs["latents"]
        timesteps = torch.randint(len(self.schedule), (len(clean),))
        noise = torch.randn_like(clean)
        return (model(self.schedule.add_noise(clean, noise, timesteps), timesteps).sample - noise).square().mean()


def pipeline(side: int, channels: tuple[int, ...]) -> DDPMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=side,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
    )
    return DDPMPipeline(unet, DDIMScheduler(num_train_timesteps=1000))


def steppers(side: int, channels: tuple[int, ...], folder: str) -> dict[str, Steps]:
    images = torch.rand(BANK, 1, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = EncodedImages(images[:BATCH])
    stock = PlainTrainer(
        pipeline(side, channels).unet,
        TrainingArguments(f"{folder}/stock", per_device_train_batch_size=BATCH, remove_unused_columns=False, **COMMON),
        train_dataset=rows,
        data_collator=default_collate,
    )
    stock.schedule = NoiseSchedule.of(pipeline(side, channels).scheduler)
    # Trained at once: the arguments of the next trainer reset what accelerate knows of this one.
    out = {"plain DDPM training": Steps(stock, {"latents": rows.latents})}
    checkpoints = []
    for number in range(2):
        model, generator = pipeline(side, channels).unet, torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-3)
        checkpoints.append(f"{folder}/checkpoint-{number}/unet")
        model.save_pretrained(checkpoints[-1])
    common = COMMON | {"grid_images": 0}
    paper = partial(
        VDUConfig.paper, f"{folder}/paper", per_device_train_batch_size=BATCH, checkpoints=checkpoints, **common
    )
    default = partial(VDUConfig, f"{folder}/default", per_device_train_batch_size=BATCH // 2, **common)
    for name, make in (("VDU, paper preset", paper), ("VDU, our defaults", default)):
        args = make()
        trainer = VDUTrainer(
            pipeline=pipeline(side, channels),
            args=args,
            forget_dataset=EncodedImages(images[: args.per_device_train_batch_size]),
            replay_dataset=EncodedImages(images) if args.own_samples else None,
            marker=lambda own: torch.arange(len(own)) < 100,
        )
        out[name] = Steps(trainer, {"forget": {"latents": trainer.forget_dataset.latents}})
    return out


if __name__ == "__main__":
    compare("diffusion_cost", __doc__, WORKLOADS, steppers, 40)
