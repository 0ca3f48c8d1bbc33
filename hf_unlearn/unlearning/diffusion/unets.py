"""The architectures around a U-Net: images alone, Stable Diffusion 1 and 2, latent consistency, SDXL, and what a ControlNet stands beside."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .architecture import Architecture
from .text_side import POOLED, TextLayer, TextSide


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


# Entries of a U-Net's config with which it must be told more than an image, a time, a prompt and a guidance scale; and the values
# with which it need not.
TOLD_MORE = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None,),
    "encoder_hid_dim_type": (None, "text_proj"),
    "attention_type": (None, "default"),
    "time_embedding_type": (None, "positional", "learned"),
}


class ImagesAlone(Architecture):
    """DDPM and its kin: a U-Net that is told nothing but the time, on pixels."""

    is_prompted = False
    has_guidance = False
    reads_prompts = ()
    told_more = TOLD_MORE

    @property
    def resolution(self) -> tuple[int, int, int]:
        return self.latent_shape

    def draw(self, what: Sequence[str] | int, latents: bool, **options: Any) -> Any:
        return self.pipe(batch_size=what, output_type="np", **options).images


class StableDiffusion(TextSide):
    """Stable Diffusion 1 and 2, latent consistency models: keys and values of every cross-attention; padding is attended to."""

    told_more = TOLD_MORE

    def check(self, argument: str) -> None:
        super().check(argument)
        config = self.denoiser.config
        read = config.encoder_hid_dim if config.encoder_hid_dim_type == "text_proj" else config.cross_attention_dim
        width = sum(getattr(self.pipe, name).config.hidden_size for name in self.encoders)
        if {width} != set(read if isinstance(read, list | tuple) else (read,)):
            raise ValueError(
                f"{argument}: its {' and '.join(self.encoders)} {'give' if self.encoders[1:] else 'gives'} vectors of {width} numbers, its unet takes cross_attention_dim={read}"
            )

    @property
    def has_guidance(self) -> bool:
        return not self.denoiser.config.time_cond_proj_dim  # else it is told the scale

    def encode(self, prompts: Sequence[str], device: torch.device | str) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self.pipe.encode_prompt(list(prompts), device, 1, False)[0]}

    def told_guidance(self, count: int, scale: float) -> dict[str, Tensor]:
        """Latent consistency, arXiv 2310.04378."""
        if not (size := self.denoiser.config.time_cond_proj_dim):
            return {}
        return {
            "timestep_cond": self.pipe.get_guidance_scale_embedding(
                torch.full((count,), scale - 1.0), embedding_dim=size
            )
        }

    def states(self, conditioning: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        tokens = conditioning["encoder_hidden_states"]
        projected = self.denoiser.config.encoder_hid_dim_type == "text_proj"
        return self.denoiser.encoder_hid_proj(tokens) if projected else tokens, None, None

    def read_by(self) -> list[TextLayer]:
        return self._cross_attention()


class StableDiffusionXL(StableDiffusion):
    """SDXL: as Stable Diffusion, with the states of two encoders side by side; and the first layer of `add_embedding`, which reads the
    pooled vector of the second encoder before the sizes.
    """

    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    told_more = TOLD_MORE | {"addition_embed_type": ("text_time",), "encoder_hid_dim_type": (None,)}
    reads_prompts = ("*.attn2.*", "add_embedding.*")

    def encode(self, prompts: Sequence[str], device: torch.device | str) -> dict[str, Tensor]:
        encoded = self.pipe.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": encoded[0], "text_embeds": encoded[2]}

    def sizes(self, count: int) -> dict[str, Tensor]:
        """Of the original image, of what was cut off, of the target."""
        _, height, width = self.resolution
        return {"time_ids": torch.tensor([[height, width, 0, 0, height, width]] * count, dtype=torch.float32)}

    def unprompted(self, conditioning: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.pipe.config.force_zeros_for_empty_prompt:
            return conditioning
        return conditioning | {
            name: torch.zeros_like(conditioning[name]) for name in ("encoder_hidden_states", "text_embeds")
        }

    def asked(self, forward, noisy: Tensor, times: Tensor, told: dict[str, Tensor]) -> Tensor:
        added = {name: told[name] for name in ("text_embeds", "time_ids")}
        others = {name: value for name, value in told.items() if name not in added}
        return forward(noisy, times, added_cond_kwargs=added, **others).sample

    def states(self, conditioning: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return conditioning["encoder_hidden_states"], None, conditioning["text_embeds"]

    def read_by(self) -> list[TextLayer]:
        width = self.pipe.text_encoder_2.config.projection_dim
        return [*self._cross_attention(), self._named("add_embedding.linear_1", POOLED, width)]


class BesideControlNet(StableDiffusion):
    """Stable Diffusion with a ControlNet, which adds to what the U-Net computes. It is trained and draws without; the ControlNet stays as it
    is, and is saved with the pipeline.
    """

    @cached_property
    def pipe_that_draws(self) -> DiffusionPipeline:
        from diffusers import StableDiffusionPipeline

        return _of_the_same_parts(StableDiffusionPipeline, self.pipe)


class XLBesideControlNet(StableDiffusionXL):
    """SDXL with a ControlNet: as [`BesideControlNet`]."""

    @cached_property
    def pipe_that_draws(self) -> DiffusionPipeline:
        from diffusers import StableDiffusionXLPipeline

        return _of_the_same_parts(StableDiffusionXLPipeline, self.pipe)


def _of_the_same_parts(kind: type[DiffusionPipeline], pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Another pipeline of the same components and settings, as far as it takes them. Not `from_pipe`, which changes their dtype."""
    known = dict(pipe.config) | pipe.components
    return kind(**{name: known[name] for name in inspect.signature(kind.__init__).parameters if name in known})
