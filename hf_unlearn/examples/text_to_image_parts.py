"""The untrained parts of small text-to-image pipelines, and what their denoisers are asked while they learn: one class a family."""

from __future__ import annotations

import string
from itertools import pairwise
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
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from ..training.noise import NoiseSchedule
from .captions import all_words
from .coloured_digits import SIZE


WIDTH, LENGTH = 64, 16  # numbers a token, tokens a caption
LATENTS, DOWN = 4, 2  # channels of a latent, pixels in a row of one
MIN_SNR = 5.0
END, SIGNS = "</w>", string.ascii_lowercase + string.digits + string.punctuation


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
    """A transformer that guesses the velocity from picture to noise, told by two CLIP text encoders and T5 (Stable Diffusion 3, arXiv
    2403.03206). Without T5 stock diffusers 0.42 loads no such pipeline from a folder; it always reads 256 tokens: most of what a step costs.

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
        self.readers = [*(CLIPTextModelWithProjection(reader_config(word)) for word in words), t5_encoder()]
        self.pipeline = StableDiffusion3Pipeline(
            vae=autoencoder(),
            text_encoder=self.readers[0],
            text_encoder_2=self.readers[1],
            text_encoder_3=self.readers[2],
            tokenizer=words[0],
            tokenizer_2=words[1],
            tokenizer_3=t5_tokenizer(),
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
    """CLIP's, with every word of the captions as one token; others are spelt with parts of them, letters and signs.

    Made here and not by the `tokenizers` library's trainer, which gives other tokens at each call where pairs are equally frequent. What
    is merged for one word stays merged, as later merges come after.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in all_words():
        while len(parts := _parts(word, ranks)) > 1:
            ranks[parts[0], parts[1]] = len(ranks)
    pieces = ["<|startoftext|>", "<|endoftext|>", *SIGNS, *(sign + END for sign in SIGNS), *map("".join, ranks)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocabulary, list(ranks), model_max_length=LENGTH)


def _parts(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """As byte-pair encoding takes a word apart: of the pairs that may be merged always the one with the lowest rank, from the left."""
    parts = [*word[:-1], word[-1] + END]
    while known := [pair for pair in pairwise(parts) if pair in ranks]:
        place = list(pairwise(parts)).index(min(known, key=ranks.__getitem__))
        parts[place : place + 2] = ["".join(parts[place : place + 2])]
    return parts


def t5_tokenizer() -> T5Tokenizer:
    """T5's, with the same words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in all_words())]
    return T5Tokenizer([*pieces, *((sign, -10.0) for sign in ("▁", *SIGNS))], extra_ids=0, model_max_length=256)


def t5_encoder() -> T5EncoderModel:
    """One layer, as wide as two CLIP encoders together."""
    return T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer()), d_model=2 * WIDTH, d_kv=16, d_ff=2 * WIDTH, num_layers=1, num_heads=4)
    )


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
