"""The untrained parts of small text-to-image pipelines, and what their denoisers are asked while they learn: one class a family."""

from __future__ import annotations

import string
from typing import Any, Protocol

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..unlearning.diffusion.noise import NoiseSchedule
from .captions import all_words
from .coloured_digits import SIZE


WIDTH, LENGTH = 64, 16  # numbers a token, tokens a caption
LATENTS, DOWN = 4, 2  # channels of a latent, pixels in a row of one
MIN_SNR = 5.0


class Family(Protocol):
    """Parts that learn together.

    Attributes:
        channels (`tuple[int, int]`): how large the denoiser is by default.
        pipeline (`DiffusionPipeline`): all of them.
        name (`str`): the denoiser's in the pipeline.
        denoiser (`nn.Module`): in training mode while it learns.
        readers (`list[nn.Module]`): text encoders.
    """

    channels: tuple[int, int]
    pipeline: DiffusionPipeline
    name: str
    denoiser: nn.Module
    readers: list[nn.Module]

    def scale_latents(self, means: Tensor) -> None:
        """Tell the VAE by how much its latents are scaled for the denoiser."""

    def read(self, captions: list[str]) -> dict[str, Tensor]:
        """What the denoiser is told, with gradients to the readers."""

    def loss(self, clean: Tensor, told: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Of one batch of latents, a scalar."""


class StableDiffusion:
    """A U-Net that guesses noise, told by one CLIP text encoder (latent diffusion, arXiv 2112.10752).

    Args:
        channels (`tuple[int, int]`): of its two levels; words enter at the lower one.
    """

    name = "unet"
    channels = (64, 96)

    def __init__(self, channels: tuple[int, int]):
        self.denoiser = UNet2DConditionModel(
            sample_size=SIZE // DOWN,
            in_channels=LATENTS,
            out_channels=LATENTS,
            layers_per_block=1,
            block_out_channels=channels,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,  # how many heads there are, in this class
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        words = tokenizer()
        reader = CLIPTextModel(reader_config(words))
        self.readers = [reader]
        self.pipeline = StableDiffusionPipeline(
            vae=autoencoder(),
            text_encoder=reader,
            tokenizer=words,
            unet=self.denoiser,
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False, set_alpha_to_one=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self.schedule = NoiseSchedule.of(self.pipeline.scheduler)

    def scale_latents(self, means: Tensor) -> None:
        self.pipeline.vae.register_to_config(scaling_factor=1 / means.std().item())

    def read(self, captions: list[str]) -> dict[str, Tensor]:
        states, _ = self.pipeline.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states}

    def loss(self, clean: Tensor, told: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Squared error of the guessed noise, each weighted by min-SNR (arXiv 2303.09556)."""
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.randint(len(self.schedule), (len(clean),), generator=generator)
        answer = self.denoiser(self.schedule.add_noise(clean, noise, times), times, **told).sample
        errors = (answer - noise).square().mean((1, 2, 3))
        return (self.schedule.weights(times, "min_snr", MIN_SNR) * errors).mean()


class StableDiffusion3:
    """A transformer that guesses the velocity from picture to noise, told by two CLIP text encoders (Stable Diffusion 3, arXiv
    2403.03206). In the place of T5, which it has not, stock diffusers 0.42 tells it 256 tokens of zeros: most of what a step costs.

    Args:
        channels (`tuple[int, int]`): its width, in heads of 16, and how many layers it has.
    """

    name = "transformer"
    channels = (64, 4)

    def __init__(self, channels: tuple[int, int]):
        width, layers = channels
        self.denoiser = SD3Transformer2DModel(
            sample_size=SIZE // DOWN,
            patch_size=2,
            in_channels=LATENTS,
            out_channels=LATENTS,
            num_layers=layers,
            attention_head_dim=16,
            num_attention_heads=width // 16,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=width,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=SIZE // DOWN // 2,
        )
        words = [tokenizer(), tokenizer()]
        self.readers = [CLIPTextModelWithProjection(reader_config(word)) for word in words]
        self.pipeline = StableDiffusion3Pipeline(
            vae=autoencoder(),
            text_encoder=self.readers[0],
            text_encoder_2=self.readers[1],
            text_encoder_3=None,
            tokenizer=words[0],
            tokenizer_2=words[1],
            tokenizer_3=None,
            transformer=self.denoiser,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )

    def scale_latents(self, means: Tensor) -> None:
        self.pipeline.vae.register_to_config(scaling_factor=1 / means.std().item(), shift_factor=means.mean().item())

    def read(self, captions: list[str]) -> dict[str, Tensor]:
        states, _, pooled, _ = self.pipeline.encode_prompt(
            captions, captions, captions, device="cpu", do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def loss(self, clean: Tensor, told: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Squared error of the guessed velocity ε − x₀, at the logit of a normal number as time (arXiv 2403.03206, section 3.1)."""
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.randn(len(clean), generator=generator).sigmoid()
        sigma = times.view(-1, 1, 1, 1)
        steps = self.pipeline.scheduler.config.num_train_timesteps
        answer = self.denoiser((1 - sigma) * clean + sigma * noise, timestep=times * steps, **told).sample
        return (answer - (noise - clean)).square().mean()


FAMILIES: dict[str, Any] = {"stable_diffusion": StableDiffusion, "sd3": StableDiffusion3}


def autoencoder() -> AutoencoderKL:
    """16 × 16 pixels to 8 × 8 latents."""
    return AutoencoderKL(
        sample_size=SIZE,
        latent_channels=LATENTS,
        block_out_channels=(32, 32),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
    )


def tokenizer() -> CLIPTokenizer:
    """CLIP's, with every word of the captions as one token; others are spelt with parts of them and letters."""
    words = [*all_words(), *string.ascii_lowercase]
    return CLIPTokenizer(model_max_length=LENGTH).train_new_from_iterator([words], 2**16, min_frequency=0)


def reader_config(words: CLIPTokenizer) -> CLIPTextConfig:
    """Of a causal text encoder of two layers."""
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
