"""What the tests of image classifiers share: random images as datasets, arguments for a few steps, weights as a dict."""

import torch
from datasets import Dataset

from hf_unlearn import UnlearnConfig


QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}


def images(n, labels, *, seed=0, size=16):
    """`n` random images as model inputs; `labels` are repeated in turn. Another seed, other ids."""
    generator = torch.Generator().manual_seed(seed)
    rows = {
        "id": [1000 * seed + row for row in range(n)],
        "pixel_values": torch.randn(n, 1, size, size, generator=generator).numpy(),
        "labels": [labels[row % len(labels)] for row in range(n)],
    }
    return Dataset.from_dict(rows).with_format("torch")


def arguments(output_dir, config=UnlearnConfig, **values):
    """A few steps of gradient descent with every safety off; `values` go on top."""
    plain = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "max_grad_norm": 0.0,
        "guard": False,
        "replay_weight": 0.0,
        "isotropic_weight": 0.0,
    }
    return config(output_dir=str(output_dir), **(QUIET | plain | values))


def weights(model):
    """A copy of parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first, second):
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def close(first, second, start):
    """But for rounding: at most 1e-4 of the way from `start`, where sums in another order differ by some 1e-6 of the
    weights, and anything drawn or done differently is as large as the way itself.
    """
    return first.keys() == second.keys() and distance(first, second) < 1e-4 * distance(start, first)


def distance(first, second):
    """Euclidean, over everything that is a float."""
    parts = [(first[k].double() - second[k].double()).square().sum() for k in first if first[k].is_floating_point()]
    return torch.stack(parts).sum().sqrt().item()
