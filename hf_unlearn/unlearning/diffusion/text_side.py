"""Where text enters a text-to-image pipeline: what its denoiser is told of a prompt, and the layers that read it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...hub.adapters import check_no_adapter
from .denoiser import guidance_of, unfuse
from .encoded import encode_prompts


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


TOKENS, POOLED = "tokens", "pooled"  # the two streams in which text reaches a denoiser


@dataclass(frozen=True)
class Told:
    """What a denoiser is told of prompts.

    Attributes:
        tokens (`Tensor`): `[n, positions, width]`, as the layers that read them see them.
        attended (`Tensor`): bool `[n, positions]`; False where no layer looks.
        pooled (`Tensor`, *optional*): `[n, width]`, one vector a prompt.
        conditioning (`dict[str, Tensor]`): the same as keyword arguments of the denoiser.
    """

    tokens: Tensor
    attended: Tensor
    pooled: Tensor | None = None
    conditioning: dict[str, Tensor] = field(default_factory=dict)

    @property
    def streams(self) -> dict[str, Tensor]:
        """`[n, positions, width]` by the name of the stream; a pooled vector has one position."""
        return {TOKENS: self.tokens} | ({} if self.pooled is None else {POOLED: self.pooled[:, None]})


@dataclass(frozen=True)
class TextLayer:
    """A linear layer that reads text: its first `width` inputs are the text, which it reads from the stream of that name."""

    name: str
    linear: nn.Linear
    stream: str
    width: int


class TextSide:
    """The text side of one architecture. Each says what it needs, encodes prompts as its pipeline does, and names its layers."""

    part = "unet"
    encoders: tuple[str, ...] = ("text_encoder",)
    tokenizers: tuple[str, ...] = ("tokenizer",)
    has_guidance = True  # classifier-free guidance multiplies a prompt's effect when it draws

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe
        for name in (self.part, *self.encoders, *self.tokenizers):
            if getattr(pipe, name, None) is None:
                raise ValueError(f"pipe: {type(pipe).__name__} has no {name}; load the pipeline with it")
        denoiser = getattr(pipe, self.part)
        self.denoiser = getattr(denoiser, "_orig_mod", denoiser)  # of torch.compile
        check_no_adapter(pipe)
        unfuse(self.denoiser)
        self.check()
        self.layers = self.read_by()
        for layer in self.layers:
            _check_weight(layer, self.part)

    def check(self) -> None:
        """Refuse what this architecture may have and is not understood here."""

    # What the denoiser is told

    def told(self, prompts: Sequence[str]) -> Told:
        """Encode prompts, as the pipeline does where it draws."""
        raise NotImplementedError

    def read_by(self) -> list[TextLayer]:
        """The layers that read what the prompts are encoded as."""
        raise NotImplementedError

    def answer(self, noisy: Tensor, share: float, told: Told) -> Tensor:
        """What the denoiser answers, `[n, …]`, to noisy latents at a share of the way from the image (0) to noise (1)."""
        raise NotImplementedError

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        """`[count, channels, height, width]`: latents of pure noise, on the CPU."""
        size = self.denoiser.config.sample_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        return torch.randn(count, self.denoiser.config.in_channels, *size, generator=generator)

    # Positions

    def segments(self) -> list[tuple[Any, int]]:
        """Tokenizers and the number of positions that each fills, one behind the other."""
        return [(self.pipe.tokenizer, self.pipe.tokenizer.model_max_length)]

    def written(self, prompts: Sequence[str]) -> list[str]:
        """Prompts as the tokenizer gets them."""
        return list(prompts)

    def ids(self, prompts: Sequence[str], *, whole: bool = False) -> list[list[list[int]]]:
        """For each segment the tokens of each prompt without padding; `whole`: also those for which there is no room."""
        found = []
        for tokenizer, length in self.segments():
            texts = self.written(prompts)
            if hasattr(self.pipe, "maybe_convert_prompt"):  # textual inversion: one word, several vectors
                texts = self.pipe.maybe_convert_prompt(texts, tokenizer)
            room = {} if whole else {"truncation": True, "max_length": length}
            found.append(tokenizer(texts, verbose=False, **room).input_ids)
        return found

    # Helpers

    @property
    def device(self) -> torch.device:
        return self.pipe._execution_device

    @property
    def guidance(self) -> float:
        """The scale of classifier-free guidance that is drawn with by default; 1 where there is none."""
        return max(1.0, guidance_of(self.pipe, None)) if self.has_guidance else 1.0

    def timesteps(self, share: float, count: int) -> Tensor:
        last = self.pipe.scheduler.config.num_train_timesteps
        return torch.full((count,), min(int(share * last), last - 1), device=self.device)

    def _longest(self) -> int:
        return inspect.signature(self.pipe.encode_prompt).parameters["max_sequence_length"].default

    def _everywhere(self, tokens: Tensor) -> Tensor:
        """Padding is attended to like words, as far as there are tokens at all."""
        filled = sum(length for _, length in self.segments())
        return (torch.arange(tokens.shape[1], device=tokens.device) < filled).expand(tokens.shape[:2])

    def _cross_attention(self) -> list[TextLayer]:
        from diffusers.models.attention_processor import Attention

        return [
            TextLayer(f"{name}.{projection}", linear, TOKENS, linear.in_features)
            for name, module in self.denoiser.named_modules()
            if isinstance(module, Attention) and module.is_cross_attention
            for projection in ("to_k", "to_v")
            for linear in (getattr(module, projection),)
        ]

    def _named(self, name: str, stream: str, width: int | None = None) -> TextLayer:
        linear = self.denoiser.get_submodule(name)
        return TextLayer(name, linear, stream, width or linear.in_features)


class StableDiffusionText(TextSide):
    """Stable Diffusion 1 and 2, latent consistency models: keys and values of every cross-attention; padding is attended to."""

    known = ("encoder_hid_dim_type", (None, "text_proj")), ("addition_embed_type", (None,))

    def check(self) -> None:
        config = self.denoiser.config
        for key, values in self.known:
            if config.get(key) not in values:
                raise ValueError(
                    f"pipe: its unet has {key}={config.get(key)!r}, by which it is told more than a prompt"
                )
        self.has_guidance = not config.get("time_cond_proj_dim")  # else it is told the scale

    def told(self, prompts: Sequence[str]) -> Told:
        tables, rows = encode_prompts(prompts, self.pipe, device=self.device)
        conditioning = {name: table[rows].to(self.device, self.denoiser.dtype) for name, table in tables.items()}
        tokens = conditioning["encoder_hidden_states"]
        if self.denoiser.config.encoder_hid_dim_type == "text_proj":
            tokens = self.denoiser.encoder_hid_proj(tokens)
        return Told(tokens, self._everywhere(tokens), None, conditioning)

    def read_by(self) -> list[TextLayer]:
        return self._cross_attention()

    def answer(self, noisy: Tensor, share: float, told: Told) -> Tensor:
        return self.denoiser(noisy, self.timesteps(share, len(noisy)), **told.conditioning).sample


class StableDiffusionXLText(StableDiffusionText):
    """SDXL: as Stable Diffusion, with the states of two encoders side by side; and the first layer of `add_embedding`, which reads the
    pooled vector of the second encoder before the sizes.
    """

    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    known = ("encoder_hid_dim_type", (None,)), ("addition_embed_type", ("text_time",))

    def told(self, prompts: Sequence[str]) -> Told:
        encoded = self.pipe.encode_prompt(list(prompts), device=self.device, do_classifier_free_guidance=False)
        tokens, pooled = (encoded[place].to(self.device, self.denoiser.dtype) for place in (0, 2))
        conditioning = {"encoder_hidden_states": tokens, "text_embeds": pooled}
        return Told(tokens, self._everywhere(tokens), pooled, conditioning)

    def read_by(self) -> list[TextLayer]:
        width = self.pipe.text_encoder_2.config.projection_dim
        return [*self._cross_attention(), self._named("add_embedding.linear_1", POOLED, width)]

    def answer(self, noisy: Tensor, share: float, told: Told) -> Tensor:
        height, width = (side * self.pipe.vae_scale_factor for side in noisy.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(noisy), device=noisy.device)
        tokens, pooled = told.conditioning["encoder_hidden_states"], told.conditioning["text_embeds"]
        added = {"text_embeds": pooled, "time_ids": sizes.to(noisy.dtype)}
        steps = self.timesteps(share, len(noisy))
        return self.denoiser(noisy, steps, encoder_hidden_states=tokens, added_cond_kwargs=added).sample


class PixArtText(TextSide):
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

    def told(self, prompts: Sequence[str]) -> Told:
        states, mask, *_ = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device, clean_caption=self._cleans
        )
        states = states.to(self.device, self.denoiser.dtype)
        projection = self.denoiser.caption_projection
        tokens = states if projection is None else projection(states)
        conditioning = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        return Told(tokens, mask.bool(), None, conditioning)

    def read_by(self) -> list[TextLayer]:
        return self._cross_attention()

    def answer(self, noisy: Tensor, share: float, told: Told) -> Tensor:
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.config.sample_size == 128:
            height, width = (float(side * self.pipe.vae_scale_factor) for side in noisy.shape[-2:])
            sizes["resolution"] = noisy.new_tensor([[height, width]] * len(noisy))
            sizes["aspect_ratio"] = noisy.new_tensor([[height / width]] * len(noisy))
        steps = self.timesteps(share, len(noisy))
        answer = self.denoiser(noisy, timestep=steps, added_cond_kwargs=sizes, **told.conditioning).sample
        return answer[:, : noisy.shape[1]]  # a learned variance stands behind the answer


class _JointAttentionText(TextSide):
    """Text and image attend to each other, so the text states change from block to block. They are a function of the words alone only
    where they enter: `context_embedder`, and for the pooled vector the first layer of `text_embedder`.
    """

    part = "transformer"

    def read_by(self) -> list[TextLayer]:
        return [
            self._named("context_embedder", TOKENS),
            self._named("time_text_embed.text_embedder.linear_1", POOLED),
        ]

    def _told(self, tokens: Tensor, pooled: Tensor, **more: Tensor) -> Told:
        tokens, pooled = (part.to(self.device, self.denoiser.dtype) for part in (tokens, pooled))
        conditioning = {"encoder_hidden_states": tokens, "pooled_projections": pooled, **more}
        return Told(tokens, self._everywhere(tokens), pooled, conditioning)


class StableDiffusion3Text(_JointAttentionText):
    """Stable Diffusion 3: two CLIPs side by side, T5's tokens behind them (where there is a T5)."""

    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")

    def segments(self) -> list[tuple[Any, int]]:
        found = [(self.pipe.tokenizer, self.pipe.tokenizer_max_length)]
        return found if self.pipe.text_encoder_3 is None else [*found, (self.pipe.tokenizer_3, self._longest())]

    def told(self, prompts: Sequence[str]) -> Told:
        same = dict.fromkeys(("prompt", "prompt_2", "prompt_3"), list(prompts))
        encoded = self.pipe.encode_prompt(**same, device=self.device, do_classifier_free_guidance=False)
        return self._told(encoded[0], encoded[2])

    def answer(self, noisy: Tensor, share: float, told: Told) -> Tensor:
        return self.denoiser(noisy, timestep=self.timesteps(share, len(noisy)), **told.conditioning).sample


class FluxText(_JointAttentionText):
    """Flux.1: T5's tokens and CLIP's pooled vector. Guidance is told, not computed, and so multiplies nothing."""

    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    has_guidance = False

    def segments(self) -> list[tuple[Any, int]]:
        return [(self.pipe.tokenizer_2, self._longest())]

    def told(self, prompts: Sequence[str]) -> Told:
        tokens, pooled, places = self.pipe.encode_prompt(list(prompts), None, device=self.device)
        return self._told(tokens, pooled, txt_ids=places.to(self.device, self.denoiser.dtype))

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        side = 2 * (self.pipe.default_sample_size // 2)
        channels = self.denoiser.config.in_channels // 4
        latents = torch.randn(count, channels, side, side, generator=generator)
        return self.pipe._pack_latents(latents, count, channels, side, side)

    def answer(self, noisy: Tensor, share: float, told: Told) -> Tensor:
        side = round(noisy.shape[1] ** 0.5)
        places = self.pipe._prepare_latent_image_ids(len(noisy), side, side, noisy.device, noisy.dtype)
        times = torch.full((len(noisy),), share, device=noisy.device, dtype=noisy.dtype)
        scale = torch.full_like(times, guidance_of(self.pipe, None)) if self.denoiser.config.guidance_embeds else None
        return self.denoiser(noisy, timestep=times, img_ids=places, guidance=scale, **told.conditioning).sample


# By the name of the pipeline, or of a class that it derives from: to import them takes seconds.
TEXT_SIDES: dict[str, type[TextSide]] = {
    "StableDiffusionPipeline": StableDiffusionText,
    "LatentConsistencyModelPipeline": StableDiffusionText,
    "StableDiffusionXLPipeline": StableDiffusionXLText,
    "PixArtAlphaPipeline": PixArtText,
    "PixArtSigmaPipeline": PixArtText,
    "StableDiffusion3Pipeline": StableDiffusion3Text,
    "FluxPipeline": FluxText,
}


def text_side_of(pipe: Any) -> TextSide:
    """The text side of a pipeline.

    Raises:
        ValueError: another pipeline, a part is missing, an adapter is loaded, or the weights that read text cannot be changed: quantised, or
            offloaded one by one.
    """
    for kind in type(pipe).__mro__:
        if kind.__name__ in TEXT_SIDES:
            return TEXT_SIDES[kind.__name__](pipe)
    raise ValueError(f"pipe: {type(pipe).__name__} is not supported; pass one of {', '.join(TEXT_SIDES)}")


def _check_weight(layer: TextLayer, part: str) -> None:
    weight = layer.linear.weight
    if type(layer.linear) is not nn.Linear or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise ValueError(
            f"pipe: {part}.{layer.name} is quantised ({type(layer.linear).__name__}, {weight.dtype}); load the {part} without, change it, "
            "quantise then"
        )
    if weight.is_meta:
        raise ValueError(
            f"pipe: the weights of its {part} are offloaded one by one; call remove_all_hooks() or load it without, or use "
            "enable_model_cpu_offload()"
        )
