"""What the tests of filters share: a filter that the eye can check, and tiny pipelines that draw something for it."""

import json
import types
from pathlib import Path
from unittest import mock

import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, ViTConfig, ViTModel

from hf_unlearn import FASTFitter, FASTSafetyChecker, FilterEncoder


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

    def judge(self, inputs):
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


def fitted_filter(channels=3):
    """A real one, with a tiny image encoder: what is not released looks bright rather than dark."""
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = FilterEncoder(ViTModel(config).eval(), kind="image")
    noise = torch.rand(40, channels, 8, 8, generator=seeded())
    fitter = FASTFitter(encoder, score="mean_difference", concepts=["bright"])
    fitter.update(undesired=noise[:20], clean=noise[20:] - 1)
    return fitter.fit(threshold="pooled_mean").checker()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_gan(channels=3):
    from hf_unlearn import DCGANGenerator, GANPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GANPipeline(DCGANGenerator(8, channels, latent_dim=4, base_channels=4))


def tiny_sdxl(stable_diffusion):
    """With the tokenizer, text encoder and autoencoder of a tiny Stable Diffusion pipeline."""
    old = stable_diffusion
    config = CLIPTextConfig(**old.text_encoder.config.to_dict() | {"projection_dim": 8})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=4,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=2,
            cross_attention_dim=16,
            attention_head_dim=2,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval()
        text_encoder_2 = CLIPTextModelWithProjection(config).eval()
    parts = {name: getattr(old, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    return StableDiffusionXLPipeline(
        **parts, text_encoder_2=text_encoder_2, tokenizer_2=old.tokenizer, unet=unet, add_watermarker=False
    )


def tiny_image_to_image(stable_diffusion):
    return StableDiffusionImg2ImgPipeline(**stable_diffusion.components, requires_safety_checker=False)


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
    text = {"prompt": ["a photo", "hot p"], "num_images_per_prompt": 2, "num_inference_steps": 2}
    if name == "ddpm":
        return Case(request.getfixturevalue("tiny_ddpm"), batch_size=4, num_inference_steps=2)
    if name == "ddim":
        from diffusers import DDIMPipeline

        unet = request.getfixturevalue("tiny_ddpm").unet
        return Case(DDIMPipeline(unet, DDIMScheduler()), batch_size=4, num_inference_steps=2, eta=0.5)
    if name == "gan":
        return Case(tiny_gan(), num_images=4)
    stable_diffusion = request.getfixturevalue("tiny_stable_diffusion")
    if name == "stable-diffusion":
        return Case(stable_diffusion, **text)
    if name == "sdxl":
        return Case(tiny_sdxl(stable_diffusion), **text)
    images = torch.rand(4, 3, 8, 8, generator=seeded(7))
    text |= {"prompt": ["a photo", "hot p"] * 2, "num_images_per_prompt": 1}
    return Case(tiny_image_to_image(stable_diffusion), **text, image=images, strength=0.9)


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


def in_place_of_the_checker():
    """Filtered pipelines are loaded with [`BrightnessChecker`]."""
    return mock.patch.object(FASTSafetyChecker, "from_pretrained", BrightnessChecker.from_pretrained)
