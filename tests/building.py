"""Small models with random weights, always the same ones."""

import torch


def build(model_class, config):
    """`model_class(config)` in eval mode, always with the same weights; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config).eval()
