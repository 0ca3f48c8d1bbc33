"""What the tests of filters share: Gaussians of which everything is known, tiny encoders and pipelines, filters of brightness."""

import json
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import (
    AnimateDiffPipeline,
    DDIMPipeline,
    DDIMScheduler,
    MotionAdapter,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from scipy.stats import norm
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ViTConfig,
    ViTModel,
)

from hf_unlearn import FASTFitter, FASTSafetyChecker, FilterEncoder


DIMENSION = 4
SHIFT = np.array([2.0, 1.0, 0.0, 0.0])  # of what is undesired


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Latents


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


# Images and encoders


class Flatten(nn.Module):
    """The user's own encoder: pixels, weighted."""

    def __init__(self, count=16, scale=1.0):
        super().__init__()
        self.weights = nn.Parameter(torch.full((count,), scale))

    def forward(self, images):
        return images.flatten(1) * self.weights


def tiny_encoder(kind="vit", **settings):
    """Of images of 8 × 8, always with the same weights."""
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2} | settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "clip":
            config = CLIPVisionConfig(**sizes, projection_dim=8, initializer_range=0.2)
            return FilterEncoder(CLIPVisionModelWithProjection(config).eval(), kind="image")
        return FilterEncoder(ViTModel(ViTConfig(**sizes)).eval(), kind="image")


def bright_images(count, channels=1, size=8, seed=0):
    images = torch.rand(count, channels, size, size, generator=seeded(seed))
    images[..., 0, 0] = -0.05  # else they would be taken for images in [0, 1]
    return images


def dark_images(count, channels=1, size=8, seed=0):
    return torch.rand(count, channels, size, size, generator=seeded(seed + 1000)) - 1


def of_brightness(encoder, channels=1, size=8):
    """A checker that flags what is bright."""
    fitter = FASTFitter(encoder, score="mean_difference", concepts={"bright": "brighter than grey"})
    fitter.update(undesired=bright_images(20, channels, size), clean=dark_images(20, channels, size))
    return fitter.fit(threshold="pooled_mean").checker()


def fitted_filter(channels=3):
    return of_brightness(tiny_encoder(), channels)


class BrightnessChecker(FASTSafetyChecker):
    """Stands in for a fitted filter: one concept, the mean of the inputs, not released above a threshold."""

    concepts = ("bright",)
    encoder = types.SimpleNamespace(kind="image")

    def __init__(self, threshold, *, latents=False):
        nn.Module.__init__(self)
        if latents:
            self.encoder = None
        self.register_buffer("threshold", torch.tensor(float(threshold)))
        self.seen = []

    def judge(self, inputs, *, value_range=None):
        assert len(inputs)
        self.seen.append(inputs.clone())
        scores = inputs.float().flatten(1).mean(1, keepdim=True).cpu()
        return ~(scores <= self.threshold.cpu()).all(1), scores

    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        content = {"threshold": self.threshold.item(), "latents": self.encoder is None}
        (Path(folder) / "config.json").write_text(json.dumps(content))

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        content = json.loads((Path(folder) / "config.json").read_text())
        return cls(content["threshold"], latents=content["latents"])


def in_place_of_the_checker():
    """Filtered pipelines are loaded with [`BrightnessChecker`]."""
    return mock.patch.object(FASTSafetyChecker, "from_pretrained", BrightnessChecker.from_pretrained)


# Pipelines


def tiny_gan(channels=3):
    from hf_unlearn import DCGANGenerator, GANPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GANPipeline(DCGANGenerator(8, channels, latent_dim=4, base_channels=4))


def tiny_sdxl(stable_diffusion):
    """With the tokenizer, text encoder and autoencoder of a tiny Stable Diffusion pipeline."""
    old, unet = stable_diffusion, stable_diffusion.unet
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "cross_attention_dim": 16}
    more["projection_class_embeddings_input_dim"] = 6 * 8 + 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
        unet = type(unet)(**config | more).eval()
        config = CLIPTextConfig(**old.text_encoder.config.to_dict() | {"projection_dim": 8})
        text_encoder_2 = CLIPTextModelWithProjection(config).eval()
    parts = {name: getattr(old, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    parts |= {"text_encoder_2": text_encoder_2, "tokenizer_2": old.tokenizer, "unet": unet}
    return StableDiffusionXLPipeline(**parts, add_watermarker=False)


def tiny_animate_diff(stable_diffusion):
    """A pipeline of videos, with the parts of a tiny Stable Diffusion pipeline."""
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    sizes = {"block_out_channels": (8, 8), "motion_layers_per_block": 1, "motion_mid_block_layers_per_block": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = MotionAdapter(**sizes, motion_num_attention_heads=2, motion_norm_num_groups=2)
    pipeline = AnimateDiffPipeline(**{name: getattr(stable_diffusion, name) for name in names}, motion_adapter=adapter)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Case:
    """A pipeline, and arguments with which it draws several images."""

    def __init__(self, pipeline, **arguments):
        self.pipeline = pipeline
        self.arguments = arguments
        pipeline.set_progress_bar_config(disable=True)

    def draw(self, pipeline=None, *, seed=0, **arguments):
        return (pipeline or self.pipeline)(**{"generator": seeded(seed), **self.arguments, **arguments})

    def brightness(self, **arguments):
        """In [−1, 1], of each image, as the filter sees it."""
        images = self.draw(output_type="pt", **arguments).images
        return (images.float() * 2 - 1).flatten(1).mean(1)

    def threshold(self, flagged, **arguments):
        """With which so many of the images are not released."""
        ordered = self.brightness(**arguments).sort(descending=True).values
        return (ordered[flagged - 1] + ordered[flagged]).item() / 2


def case(name, request):
    if name == "gan":
        return Case(tiny_gan(), num_images=4)
    steps = {"num_inference_steps": 2}
    if name in ("ddpm", "ddim"):
        pipeline = request.getfixturevalue("tiny_ddpm")
        if name == "ddpm":
            return Case(pipeline, batch_size=4, **steps)
        return Case(DDIMPipeline(pipeline.unet, DDIMScheduler()), batch_size=4, eta=0.5, **steps)
    stable_diffusion = request.getfixturevalue("tiny_stable_diffusion")
    text = {"prompt": ["a photo", "hot p"], "num_images_per_prompt": 2, **steps}
    if name == "stable-diffusion":
        return Case(stable_diffusion, **text)
    if name == "sdxl":
        return Case(tiny_sdxl(stable_diffusion), **text)
    images = torch.rand(4, 3, 8, 8, generator=seeded(7))
    text |= {"prompt": ["a photo", "hot p"] * 2, "num_images_per_prompt": 1}
    pipeline = StableDiffusionImg2ImgPipeline(**stable_diffusion.components, requires_safety_checker=False)
    return Case(pipeline, **text, image=images, strength=0.9)


def loaders_without_a_filter(
    root, names=("DDPM", "DDIM", "StableDiffusion", "Flux", "AutoPip", "Diffusion", "Modular")
):
    """Loaders of these libraries whose names begin like this, with what each makes out of `root`: nothing, one hopes."""
    import sys

    import diffusers

    loaders = [
        value
        for name in dir(diffusers)
        if name.startswith(tuple(names))
        and hasattr(value := getattr(diffusers, name), "from_pretrained")
        and name.endswith(("Pipeline", "2Image", "Inpainting"))
    ]
    if "hf_unlearn" in sys.modules:
        import hf_unlearn

        loaders.append(hf_unlearn.GANPipeline)
    assert len(loaders) > 20 or len(names) == 1, loaders
    made = []
    for loader in loaders:
        for arguments in ({}, {"safety_checker": None}, {"local_files_only": True, "trust_remote_code": True}):
            try:
                made.append((loader.__name__, type(loader.from_pretrained(root, **arguments)).__name__))
            except Exception:
                continue
    return made
