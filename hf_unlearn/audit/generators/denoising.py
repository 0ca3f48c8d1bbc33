"""A pipeline's denoiser as training sees it: its loss, and some steps of ordinary fine-tuning."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...images import to_latents
from ...modes import seeded_generator
from ...training.noise import FlowSchedule, NoiseSchedule
from ..audited import trained_on
from ..weights import size_of_weights
from .data import Images
from .subject import in_eval, part_of, takes


TIMES = 10  # at which the loss of an image is read, evenly over the schedule
AT_ONCE = 16  # images or prompts
RATE = 0.003  # of a step of AdamW, in root mean squares of the weights


class _Told(Exception):
    """Ends a pipeline's call where it would ask its denoiser for the first time."""


class Denoising:
    """The denoiser of a pipeline, and all that it must be told.

    Args:
        pipe (`DiffusionPipeline`): one that may be changed, or is only looked at.
        drawing (`dict`): keyword arguments of its call.

    Raises:
        ValueError: the noise of its scheduler is of a kind that is not known here.
    """

    def __init__(self, pipe: Any, drawing: Mapping[str, Any]):
        self.pipe, self.drawing = pipe, drawing
        self.denoiser: nn.Module = getattr(pipe, part_of(pipe))
        self.device = next(self.denoiser.parameters()).device
        self.argument = next(name for name in inspect.signature(self.denoiser.forward).parameters)

    def schedule(self, clean: Tensor) -> NoiseSchedule:
        if type(self.pipe.scheduler).__name__.startswith("FlowMatch"):
            return FlowSchedule.of(self.pipe.scheduler, clean.shape[-1] * clean.shape[-2] // 4).to(self.device)
        return NoiseSchedule.of(self.pipe.scheduler).to(self.device)

    def clean(self, images: Tensor) -> Tensor:
        """What the denoiser sees of images: themselves, or the means of their latents."""
        vae = getattr(self.pipe, "vae", None)
        if vae is None:
            return images
        with in_eval(self.pipe):
            return torch.cat([to_latents(part, vae, vae.device)[0] for part in images.split(AT_ONCE)])

    @torch.no_grad()
    def told(self, prompts: Sequence[str] | None) -> dict[str, Any]:
        """What the pipeline tells its denoiser of prompts, without guidance: keyword arguments of the forward, a row of each table a prompt."""
        if not prompts:
            return {}
        with in_eval(self.pipe):
            return _joined([self._told(list(prompts[row : row + AT_ONCE])) for row in range(0, len(prompts), AT_ONCE)])

    def _told(self, prompts: list[str]) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.update(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
            raise _Told

        unguided = {"guidance_scale": 1.0} if takes(self.pipe, "guidance_scale") else {}
        generator = torch.Generator().manual_seed(0)  # not the global one: what it draws is not looked at
        handle = self.denoiser.register_forward_pre_hook(look, with_kwargs=True)
        try:
            self.pipe(
                **{"prompt": prompts}
                | dict(self.drawing)
                | unguided
                | {"generator": generator, "output_type": "latent"}
            )
        except _Told:
            pass
        finally:
            handle.remove()
        if seen[self.argument].dim() != 4 or len(seen[self.argument]) != len(prompts):
            raise ValueError(
                f"{type(self.pipe).__name__} packs or doubles what its denoiser sees, which is not trained here"
            )
        return {name: value for name, value in seen.items() if name not in (self.argument, "timestep", "return_dict")}

    def losses(self, clean: Tensor, told: Mapping[str, Any], noise: Tensor, times: Tensor) -> Tensor:
        """Mean squared error of each image's answer, `[n]`, on the denoiser's device."""
        clean, noise, times = (value.to(self.device) for value in (clean, noise, times))
        schedule, dtype = self.schedule(clean), next(self.denoiser.parameters()).dtype
        noisy = schedule.add_noise(clean, noise, times)
        given = {self.argument: noisy.to(dtype), "timestep": schedule.times(times), "return_dict": False}
        answer = self.denoiser(**(_cast(told, dtype) | given))[0][:, : clean.shape[1]]
        return (answer.float() - schedule.target(clean, noise, times)).square().flatten(1).mean(1)


@torch.no_grad()
def denoising_loss(pipe: Any, images: Images, drawing: Mapping[str, Any], seed: int) -> float:
    """Mean of the denoising losses of images, each at [`TIMES`] times with noise that is the same for every model.

    Raises:
        ValueError: it is not finite, or cannot be read in this pipeline.
    """
    model, total = Denoising(pipe, drawing), 0.0
    told = model.told(images.prompts)
    generator = seeded_generator("cpu", seed, 50)
    for begin in range(0, len(images), AT_ONCE):
        rows = torch.arange(begin, min(begin + AT_ONCE, len(images)))
        clean = model.clean(images.pixels[rows])
        last = len(model.schedule(clean))
        for number in range(TIMES):
            noise = torch.randn(clean.shape, generator=generator)
            times = torch.full((len(rows),), int((number + 0.5) / TIMES * last))
            with in_eval(pipe):
                total += float(model.losses(clean, rows_of(told, rows), noise, times).sum())
    value = total / (TIMES * len(images))
    if not value < float("inf"):
        raise ValueError("what the model gave is not finite")
    return value


def finetuned(
    pipe: Any,
    images: Images,
    batch: Callable[[int], Tensor],
    marks: Sequence[int],
    drawing: Mapping[str, Any],
    seed: int,
) -> Iterator[Any]:
    """A pipeline after so many steps of AdamW on images and prompts, in place; the rate is in units of the weights' size.

    Args:
        pipe (`DiffusionPipeline`): its denoiser is trained, in fp32 whatever it is in.
        batch (callable): of a step to the rows of `images` that it sees.
        marks (`Sequence[int]`): steps after which the pipeline is given.
    """
    model = Denoising(pipe, drawing)
    clean, told = model.clean(images.pixels), model.told(images.prompts)
    generator = seeded_generator("cpu", seed, 51)
    trained, dtype = model.denoiser, next(model.denoiser.parameters()).dtype
    trained.float().requires_grad_(True)
    last = len(model.schedule(clean))

    def loss(step: int) -> Tensor:
        rows = batch(step)
        noise = torch.randn(clean[rows].shape, generator=generator)
        times = torch.randint(last, (len(rows),), generator=generator)
        return model.losses(clean[rows], rows_of(told, rows), noise, times).mean()

    for _ in trained_on(trained, loss, marks, RATE * size_of_weights(trained)):
        if dtype == torch.float32:
            yield pipe
        else:
            drawing_pipe = copy.copy(pipe)
            drawing_pipe.register_modules(**{part_of(pipe): copy.deepcopy(trained).to(dtype)})
            yield drawing_pipe


def rows_of(told: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """Some rows of every table."""
    return _mapped(told, lambda value: value[rows.to(value.device)])


def _cast(told: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return _mapped(told, lambda value: value.to(dtype) if value.is_floating_point() else value)


def _mapped(told: Mapping[str, Any], function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {
        name: function(value) if isinstance(value, Tensor) else _mapped(value, function) if isinstance(value, Mapping) else value
        for name, value in told.items()
    }  # fmt: skip


def _joined(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = tables[0]
    return {
        name: torch.cat([one[name] for one in tables]) if isinstance(value, Tensor)
        else _joined([one[name] for one in tables]) if isinstance(value, Mapping) and value
        else value
        for name, value in first.items()
    }  # fmt: skip
