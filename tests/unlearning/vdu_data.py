"""What the tests of VDU's files share: random images as datasets, and arguments for a few steps of tiny pipelines."""

import copy

import torch
from datasets import Dataset
from image_data import QUIET

from hf_unlearn import VDUConfig, VDUTrainer


PROMPTS = ["a photo", "a hot pot"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def rows(images, **columns):
    """Images as a dataset, with more columns of one value each."""
    more = {name: [value] * len(images) for name, value in columns.items()}
    return Dataset.from_dict({"pixel_values": images.numpy(), **more}).with_format("torch")


def images(n=8, *, seed=0, size=8, channels=1):
    """`n` bright images in [−1, 1], of a kind that an untrained model does not draw."""
    bright = 1 - 0.5 * torch.rand(n, channels, size, size, generator=seeded(seed))
    bright[..., 0, 0] = -0.1  # or they might be in [0, 1]
    return rows(bright)


def prompted_images(n=4, *, seed=0):
    """`n` random images with a prompt each."""
    return images(n, seed=seed, channels=3).add_column("prompt", [PROMPTS[row % 2] for row in range(n)])


def arguments(output_dir, **values):
    """A few steps with the guard off; `values` go on top."""
    plain = {
        "learning_rate": 0.01, "max_steps": 3, "per_device_train_batch_size": 4, "guard": False, "own_samples": 16,
        "num_inference_steps": 2, "batch_size": 16, "grid_images": 0, "seed": 0,
    }  # fmt: skip
    return VDUConfig(output_dir=str(output_dir), **(QUIET | plain | values))


def prompted_arguments(output_dir, **values):
    """The same for a prompted pipeline, without the closed form: a thousand prompts are encoded for it."""
    plain = {
        "replay_prompts": ["pot", "a hat"], "own_samples": 4, "forget_samples": 4, "learning_rate": 0.05, "closed_form": False,
    }  # fmt: skip
    return arguments(output_dir, **(plain | values))


def trained(pipeline, args, **data):
    """A trainer that has trained `pipeline` in place."""
    if "forget_dataset" not in data and not args.forget_prompts:
        data["forget_dataset"] = prompted_images() if hasattr(pipeline, "vae") else images()
    trainer = VDUTrainer(pipeline=pipeline, args=args, **data)
    trainer.train()
    return trainer


def near(model, seed=0, scale=0.01):
    """A copy with every parameter a little off, as another checkpoint of its run would be."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter += scale * torch.randn(parameter.shape, generator=seeded(1000 * seed + index))
    return model
