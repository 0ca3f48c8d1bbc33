"""One architecture of denoisers in its pipeline: what the denoiser is told, how it is called, what it sees of an image, how it draws."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...training.noise import NoiseSchedule


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


PROMPT_COLUMNS = ("prompt", "text", "caption")
AT_ONCE = 64  # prompts encoded


class Architecture:
    """What differs from one architecture to the next, said once: the trainers and the closed forms both go through it.

    It holds nothing but the pipeline, and is made wherever it is needed ([`hf_unlearn.unlearning.diffusion.pipelines.architecture_of`]).
    Latents are always `[batch, channels, height, width]` here, also where the denoiser sees them packed.

    Args:
        pipe (`DiffusionPipeline`): one of this architecture.
    """

    part = "unet"  # the pipeline's name of its denoiser
    encoders: tuple[str, ...] = ()
    tokenizers: tuple[str, ...] = ()
    is_prompted = True  # whether the denoiser is told what to draw, by words or by a class
    has_guidance = True  # whether classifier-free guidance multiplies a prompt's effect when it draws
    columns = PROMPT_COLUMNS  # of a data set, in which prompts stand
    reads_prompts: tuple[str, ...] = ("*.attn2.*",)  # patterns of the parameters by which a prompt enters
    lora_layers: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    told_more: Mapping[
        str, tuple
    ] = {}  # entries of the denoiser's config, and the values with which it is told no more than is known here

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe

    @property
    def denoiser(self) -> nn.Module:
        denoiser = getattr(self.pipe, self.part)
        return getattr(denoiser, "_orig_mod", denoiser)  # of torch.compile

    def check(self, argument: str) -> None:
        """Refuse what this architecture may have and is not understood here.

        Args:
            argument (`str`): what to call the pipeline in an error.

        Raises:
            ValueError: a part is missing, or the denoiser is told more than a prompt.
        """
        for name in (self.part, *self.encoders, *self.tokenizers):
            if getattr(self.pipe, name, None) is None:
                raise ValueError(f"{argument}: {type(self.pipe).__name__} has no {name}; load the pipeline with it")
        check_told(self.denoiser, self.told_more, f"{argument}: its {self.part}")

    def settle(self) -> None:
        """Take away, in place, what would make training see another denoiser than drawing does."""

    @property
    def schedule(self) -> NoiseSchedule:
        """What is noised in which way, and what the denoiser should answer."""
        return NoiseSchedule.of(self.pipe.scheduler)

    @cached_property
    def device(self) -> torch.device:
        """Where the pipeline computes, also where its parts are offloaded; found by going through all their modules."""
        return self.pipe._execution_device

    # What the denoiser is told

    @property
    def encoders_there(self) -> list[str]:
        """The pipeline's text encoders, also those that it may lack."""
        parts = self.pipe.components
        return [name for name, part in parts.items() if name.startswith("text_encoder") and part is not None]

    def encode(self, prompts: Sequence[str], device: torch.device | str) -> dict[str, Tensor]:
        """What prompts become, as the pipeline encodes them where it draws: a row each, in the dtype of the encoders."""
        raise NotImplementedError

    def sizes(self, count: int) -> dict[str, Tensor]:
        """What the denoiser is told of the image's size: a row each, on the CPU."""
        return {}

    def told_guidance(self, count: int, scale: float) -> dict[str, Tensor]:
        """What a denoiser is told that takes the guidance scale as an input: a row each, on the CPU."""
        return {}

    def conditioning(
        self, prompts: Sequence[str], device: torch.device | str, guidance_scale: float | None = None
    ) -> dict[str, Tensor]:
        """All that the denoiser is told of prompts, a row of each table a prompt: [`~Architecture.call`] takes it.

        Args:
            guidance_scale (`float`, *optional*): for those that take it as an input. Default: the pipeline's own.
        """
        count = len(prompts)
        told = self.sizes(count) | self.told_guidance(count, self.guidance_scale(guidance_scale))
        return self.encode(prompts, device) | {name: table.to(device) for name, table in told.items()}

    def unprompted(self, conditioning: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the denoiser is told without a prompt, as classifier-free guidance has it, of what it is told with the empty prompt."""
        return conditioning

    def guidance_scale(self, given: float | None = None) -> float:
        """What is given, or the scale of guidance that the pipeline draws with by default."""
        return self._usual_guidance if given is None else given

    @cached_property
    def _usual_guidance(self) -> float:
        return inspect.signature(self.pipe.__call__).parameters["guidance_scale"].default

    def free_guidance(self, given: float | None = None) -> float:
        """The scale of classifier-free guidance that is drawn with, by default the pipeline's own; 1 where there is none, also where the
        denoiser is told a scale instead.
        """
        return max(1.0, self.guidance_scale(given)) if self.has_guidance else 1.0

    # How it is called

    def call(self, forward: Callable, noisy: Tensor, times: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """What the denoiser answers, `[batch, channels, height, width]`, without a learned variance.

        Args:
            forward (callable): the denoiser, or what stands for it with other weights.
            noisy (`Tensor`): `[batch, channels, height, width]`.
            times (`Tensor`): `[batch]`, as [`~hf_unlearn.training.noise.NoiseSchedule.times`] gives them.
            conditioning (`dict[str, Tensor]`): of [`~Architecture.conditioning`], a row for each of the batch.
        """
        dtype = self.denoiser.dtype
        answer = self.asked(forward, noisy.to(dtype), times, cast(conditioning, dtype))
        return answer[:, : noisy.shape[1]]  # a learned variance stands behind the answer

    def asked(self, forward: Callable, noisy: Tensor, times: Tensor, told: dict[str, Tensor]) -> Tensor:
        """[`~Architecture.call`], in the denoiser's dtype."""
        return forward(noisy, times, **told).sample

    def times(self, share: float, count: int) -> Tensor:
        """What is told of the time at a share of the way from the image (0) to noise (1): `[count]`."""
        last = self.pipe.scheduler.config.num_train_timesteps
        return torch.full((count,), min(int(share * last), last - 1), device=self.device)

    # What it sees of an image

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)` of what the denoiser sees."""
        size = self.denoiser.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.denoiser.config.in_channels, height, width

    @property
    def resolution(self) -> tuple[int, int, int]:
        """`(channels, height, width)` of the images that the pipeline makes."""
        _, height, width = self.latent_shape
        scale = 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)
        return self.pipe.vae.config.in_channels, height * scale, width * scale

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        """`[count, channels, height, width]`: latents of pure noise, on the CPU."""
        return torch.randn(count, *self.latent_shape, generator=generator)

    # How it draws

    @property
    def pipe_that_draws(self) -> DiffusionPipeline:
        """A pipeline that draws from a prompt alone, of the same parts."""
        return self.pipe

    def draw(self, what: Sequence[str] | int, latents: bool, **options: Any) -> Any:
        """What the pipeline draws for prompts, or where it takes none so many: images as an array in [0, 1], or latents.

        Args:
            latents (`bool`): give what the denoiser made, before the VAE.
            options: of the pipeline's call.
        """
        form = "latent" if latents else "np"
        return self.pipe_that_draws(list(what), output_type=form, **options).images


def check_told(denoiser: nn.Module, told_more: Mapping[str, tuple], what: str) -> None:
    """Refuse a denoiser whose config has an entry with another value than these.

    Args:
        what (`str`): what to call it in an error.
    """
    for key, values in told_more.items():
        value = denoiser.config.get(key)
        if value not in values:
            raise ValueError(
                f"{what} has {key}={value!r}, by which it is told more than an image and a prompt; that is not supported"
            )


def cast(conditioning: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Numbers in the denoiser's dtype; masks and classes as they are."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in conditioning.items()}
