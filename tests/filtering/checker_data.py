"""Marks on two Gaussians, of which everything is known, and tiny encoders of every kind."""

import numpy as np
import torch
from scipy.stats import norm
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from hf_unlearn import FASTFitter, FilterEncoder


DIMENSION = 4
SHIFT = np.array([2.0, 1.0, 0.0, 0.0])  # of what is undesired


def clean_latents(count, seed=0):
    return np.random.default_rng([seed, 1]).standard_normal((count, DIMENSION))


def undesired_latents(count, seed=0):
    return np.random.default_rng([seed, 2]).standard_normal((count, DIMENSION)) + SHIFT


def unmarked_latents(count, prevalence=0.1, seed=0):
    """Undesired ones among clean ones, each with a chance of `prevalence`."""
    random = np.random.default_rng([seed, 3])
    rows = random.standard_normal((count, DIMENSION))
    return rows + SHIFT * (random.random(count) < prevalence)[:, None]


def share_above(concept, mean=0.0):
    """Exactly how much of N(mean, I) a fitted linear score blocks."""
    score = concept.score
    return norm.sf(concept.threshold.value - score.bias - score.weight @ (mean - score.mean))


def fitter_of_latents(score="quadratic", *, seed=0, undesired=30, clean=150, unmarked=400, **arguments):
    fitter = FASTFitter(score=score, seed=seed, **arguments)
    fitter.update(undesired=undesired_latents(undesired, seed), clean=clean_latents(clean, seed))
    if unmarked:
        fitter.update(unmarked=unmarked_latents(unmarked, seed=seed))
    return fitter


class Flatten(nn.Module):
    """The user's own encoder: pixels, weighted."""

    def __init__(self, count=16, scale=1.0):
        super().__init__()
        self.weights = nn.Parameter(torch.full((count,), scale))

    def forward(self, images):
        return images.flatten(1) * self.weights


def tiny_clip():
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=8,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FilterEncoder(CLIPVisionModelWithProjection(config).eval(), kind="image")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bright_images(count, channels=1, size=8, seed=0):
    return torch.rand(count, channels, size, size, generator=seeded(seed))


def dark_images(count, channels=1, size=8, seed=0):
    return torch.rand(count, channels, size, size, generator=seeded(seed + 1000)) - 1


def of_brightness(encoder, channels=1, size=8):
    """A checker that flags what is bright."""
    fitter = FASTFitter(encoder, score="mean_difference", concepts={"bright": "brighter than grey"})
    fitter.update(undesired=bright_images(20, channels, size), clean=dark_images(20, channels, size))
    return fitter.fit(threshold="pooled_mean").checker()
