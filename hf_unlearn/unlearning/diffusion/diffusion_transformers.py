"""The architectures around a transformer: PixArt, DiT, Stable Diffusion 3 and Flux.1."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ...training.noise import FlowSchedule
from .architecture import PROMPT_COLUMNS, Architecture
from .text_side import POOLED, TOKENS, TextLayer, TextSide


class PixArt(TextSide):
    """PixArt-α and -Σ: keys and values of every cross-attention, which read the text behind `caption_projection`; padding is masked."""

    part = "transformer"

    def segments(self) -> list[tuple[Any, int]]:
        return [(self.pipe.tokenizer, self._longest())]

    def written(self, prompts: Sequence[str]) -> list[str]:
        return self.pipe._text_preprocessing(list(prompts), clean_caption=self._cleans)

    @property
    def _cleans(self) -> bool:
        """Whether the pipeline cleans captions when it draws: by default, where these libraries are there."""
        from diffusers.utils import is_bs4_available, is_ftfy_available

        return is_bs4_available() and is_ftfy_available()

    def encode(self, prompts: Sequence[str], device: torch.device | str) -> dict[str, Tensor]:
        states, mask, *_ = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=device, clean_caption=self._cleans
        )
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def sizes(self, count: int) -> dict[str, Tensor]:
        if not self.denoiser.use_additional_conditions:
            return {}
        _, height, width = self.resolution
        return {
            "resolution": torch.tensor([[float(height), float(width)]] * count),
            "aspect_ratio": torch.tensor([[height / width]] * count),
        }

    def asked(self, forward: Callable, noisy: Tensor, times: Tensor, told: dict[str, Tensor]) -> Tensor:
        added = {name: told.get(name) for name in ("resolution", "aspect_ratio")}
        others = {name: value for name, value in told.items() if name not in added}
        return forward(noisy, timestep=times, added_cond_kwargs=added, **others).sample

    def states(self, conditioning: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        tokens, projection = conditioning["encoder_hidden_states"], self.denoiser.caption_projection
        attended = conditioning["encoder_attention_mask"].bool()
        return tokens if projection is None else projection(tokens), attended, None

    def read_by(self) -> list[TextLayer]:
        return self._cross_attention()

    def draw(self, what: Sequence[str] | int, latents: bool, **options: Any) -> Any:
        """At the size that it was trained at, which is in none of its bins where it is another than theirs."""
        return super().draw(what, latents, use_resolution_binning=False, clean_caption=self._cleans, **options)


class DiT(Architecture):
    """DiT (arXiv 2212.09748), told a class of ImageNet: prompts are the names of classes (`pipe.labels`) or their numbers, and the empty
    prompt is the class that stands for none. A class enters by an embedding in each block.
    """

    part = "transformer"
    columns = (*PROMPT_COLUMNS, "class_labels", "label")
    reads_prompts = ("*.class_embedder.*",)
    NONE = 1000  # `DiTPipeline` says so, whatever the transformer (diffusers 0.42)

    def check(self, argument: str) -> None:
        super().check(argument)
        if (count := self.denoiser.config.num_embeds_ada_norm) != self.NONE:
            raise ValueError(
                f"{argument}: its transformer knows {count} classes; DiTPipeline draws without a class by the number {self.NONE}, so "
                "there must be as many"
            )

    def settle(self) -> None:
        """No label is dropped at random: student and original would be told different ones. And the names of the classes are saved with
        the pipeline, which stock diffusers 0.42 forgets.
        """
        super().settle()
        names: dict[int, list[str]] = {}
        for name, label in self.pipe.labels.items():
            names.setdefault(label, []).append(name)
        self.pipe.register_to_config(id2label={str(label): ", ".join(found) for label, found in names.items()})
        for layer in self.denoiser.modules():
            if hasattr(layer, "token_drop"):
                layer.dropout_prob = (
                    0.0  # what `training` of diffusers 0.42's LabelEmbedding asks; of no use when it draws
                )

    def encode(self, prompts: Sequence[str], device: torch.device | str) -> dict[str, Tensor]:
        return {"class_labels": torch.tensor([self._label(prompt) for prompt in prompts], device=device)}

    def _label(self, prompt: str) -> int:
        if not prompt:
            return self.NONE
        if prompt in self.pipe.labels:
            return self.pipe.labels[prompt]
        if prompt.isdecimal() and int(prompt) < self.NONE:
            return int(prompt)
        raise ValueError(
            f"prompt: {prompt!r} is no class of this pipeline; give one of pipeline.labels, or its number as a text"
        )

    def asked(self, forward: Callable, noisy: Tensor, times: Tensor, told: dict[str, Tensor]) -> Tensor:
        return forward(noisy, timestep=times, **told).sample

    def draw(self, what: Sequence[str] | int, latents: bool, **options: Any) -> Any:
        classes, pipe, drawn = [self._label(prompt) for prompt in what], self.pipe, []
        if not latents:
            return pipe(classes, output_type="np", **options).images
        # It gives images only: another pipeline of the same parts, with a VAE that keeps what it gets.
        pipe = copy.copy(pipe)
        config = self.pipe.vae.config
        pipe.__dict__["vae"] = SimpleNamespace(
            config=config, decode=lambda made: SimpleNamespace(sample=drawn.append(made) or made)
        )
        pipe(classes, output_type="pt", **options)
        return drawn[0] * config.scaling_factor


class JointAttention(TextSide):
    """Text and image attend to each other, so the text states change from block to block. They are a function of the words alone only
    where they enter: `context_embedder`, and for the pooled vector the first layer of `text_embedder`. Flow matching.
    """

    part = "transformer"
    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    # What is trained where only what reads the words is to be: the embedders, and the text's own keys and values in every joint block.
    reads_prompts = ("context_embedder.*", "time_text_embed.text_embedder.*", "*.add_k_proj.*", "*.add_v_proj.*")
    lora_layers = (*Architecture.lora_layers, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    def check(self, argument: str) -> None:
        super().check(argument)
        if any(hasattr(layer, "to_added_qkv") for layer in self.denoiser.modules()):
            raise ValueError(
                f"{argument}: its projections are fused, which is not saved; load it and do not fuse them"
            )

    @property
    def schedule(self) -> FlowSchedule:
        _, height, width = self.latent_shape
        return FlowSchedule.of(self.pipe.scheduler, (height // self.patch) * (width // self.patch))

    @property
    def patch(self) -> int:
        """Side of the square of latents that is one token."""
        return self.denoiser.config.patch_size

    def times(self, share: float, count: int) -> Tensor:
        last = self.pipe.scheduler.config.num_train_timesteps
        return torch.full((count,), share * last, device=self.device)

    def states(self, conditioning: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return conditioning["encoder_hidden_states"], None, conditioning["pooled_projections"]

    def read_by(self) -> list[TextLayer]:
        return [
            self._named("context_embedder", TOKENS),
            self._named("time_text_embed.text_embedder.linear_1", POOLED),
        ]


class StableDiffusion3(JointAttention):
    """Stable Diffusion 3: two CLIPs side by side, T5's tokens behind them (where there is a T5)."""

    def segments(self) -> list[tuple[Any, int]]:
        found = [(self.pipe.tokenizer, self.pipe.tokenizer_max_length)]
        return found if self.pipe.text_encoder_3 is None else [*found, (self.pipe.tokenizer_3, self._longest())]

    def encode(self, prompts: Sequence[str], device: torch.device | str) -> dict[str, Tensor]:
        same = dict.fromkeys(("prompt", "prompt_2", "prompt_3"), list(prompts))
        encoded = self.pipe.encode_prompt(**same, device=device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": encoded[0], "pooled_projections": encoded[2]}

    def asked(self, forward: Callable, noisy: Tensor, times: Tensor, told: dict[str, Tensor]) -> Tensor:
        return forward(noisy, timestep=times, **told).sample


class Flux(JointAttention):
    """Flux.1: T5's tokens and CLIP's pooled vector; latents in packs of 2 × 2. Guidance is told, not computed, and so multiplies nothing."""

    has_guidance = False
    patch = 2

    def segments(self) -> list[tuple[Any, int]]:
        return [(self.pipe.tokenizer_2, self._longest())]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = 2 * (self.pipe.default_sample_size // 2)
        return self.denoiser.config.in_channels // 4, side, side

    def encode(self, prompts: Sequence[str], device: torch.device | str) -> dict[str, Tensor]:
        tokens, pooled, _ = self.pipe.encode_prompt(list(prompts), None, device=device)
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    def told_guidance(self, count: int, scale: float) -> dict[str, Tensor]:
        return {"guidance": torch.full((count,), float(scale))} if self.denoiser.config.guidance_embeds else {}

    def asked(self, forward: Callable, noisy: Tensor, times: Tensor, told: dict[str, Tensor]) -> Tensor:
        _, _, height, width = noisy.shape
        places = {
            "txt_ids": noisy.new_zeros(told["encoder_hidden_states"].shape[1], 3),
            "img_ids": self.pipe._prepare_latent_image_ids(1, height // 2, width // 2, noisy.device, noisy.dtype),
        }
        packed = self.pipe._pack_latents(noisy, *noisy.shape)
        # In this order, as the pipeline rounds it.
        answer = forward(packed, timestep=times.to(noisy.dtype) / 1000, **told, **places).sample
        return self._unpacked(answer, height, width)

    def _unpacked(self, packed: Tensor, height: int, width: int) -> Tensor:
        return self.pipe._unpack_latents(packed, height, width, 1)

    def draw(self, what: Sequence[str] | int, latents: bool, **options: Any) -> Any:
        drawn = super().draw(what, latents, **options)
        return self._unpacked(drawn, *self.latent_shape[1:]) if latents else drawn
