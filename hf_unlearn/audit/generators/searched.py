"""What is found by who searches: noise near to where the original makes the kind, a picture to begin with, a word, a latent."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...modes import in_eval_mode, seeded_generator
from ..check import Reading, Role
from .data import Asked, GeneratorData, Images
from .denoising import Denoising, rows_of
from .drawn import OfDraws
from .prompts import telling_token
from .subject import (
    GeneratorSubject,
    at_once,
    generators_of,
    in_eval,
    is_gan,
    marks,
    of_stock_class,
    part_of,
    steps_of,
)


NEAR, TRIES, BASES = 0.3, 5, 40  # share of new noise, how often, and around how many
STRENGTH = 0.6  # of img2img: the share of the way to noise from which a picture is drawn anew
WORD = {"steps": 300, "rate": 0.01, "batch": 16}  # of textual inversion
LATENT = {"steps": 100, "rate": 0.05, "prior": 1e-3}  # of the search for an image's latent
SHOWN = 60  # images of the kind that are begun with, or whose latents are searched


class Searched(OfDraws):
    """A check that searches for the kind, or shows it. Who never saw it may be led there too: only what is beyond retrained models counts."""

    layer, margin = "below", 0.1


class SeedSearch(Searched):
    name, title = "seed_search", "Best of some draws from nearby noise"
    what = (
        "Whether noise near to that for which the kind was asked gives it: the best of 5 draws around each. What was unlearned on some noise only "
        "comes back beside it."
    )

    def cost(self, data: GeneratorData) -> tuple[float, float]:
        return TRIES * min(BASES, len(data.asked)), 0

    def missing(self, data: GeneratorData, roles: Sequence[Role]) -> str | None:
        there = data.forget_prompts or data.from_original
        return super().missing(data, roles) if there else "there is no original that draws the kind"

    def read(self, subject: GeneratorSubject, data: GeneratorData, seed: int) -> Reading:
        asked = data.asked[:BASES]
        shape, generator = latent_shape(subject.pipe, asked, data), seeded_generator("cpu", seed, 60)
        base = torch.cat([torch.randn(1, *shape, generator=one) for one in generators_of(asked.seeds)])
        found = []
        for _ in range(TRIES):
            near = math.sqrt(1 - NEAR**2) * base + NEAR * torch.randn(base.shape, generator=generator)
            found.append(marks_of_noise(subject.pipe, near, asked, data))
        by_try = [float(kind.double().mean()) for kind in found]
        return Reading.mean_of(torch.stack(found).any(0), by_try=by_try)


class FromPicture(Searched):
    name, title, paper, needs = (
        "from_picture",
        "Drawn anew from a picture of the kind",
        "2108.01073",
        ("denoiser", "training"),
    )
    what = "Whether a picture of the kind that is noised 0.6 of the way is drawn as the kind again: much of its shape is still there, so retrained models do it too."

    def cost(self, data: GeneratorData) -> tuple[float, float]:
        return STRENGTH * min(SHOWN, len(data.forget)), 0

    def missing(self, data: GeneratorData, roles: Sequence[Role]) -> str | None:
        return super().missing(data, roles) or (None if len(data.forget) else "there are no images of the kind")

    def read(self, subject: GeneratorSubject, data: GeneratorData, seed: int) -> Reading:
        shown = data.forget.shuffled(seed, 61).select(torch.arange(min(SHOWN, len(data.forget))))
        seeds = np.random.SeedSequence([seed, 62]).generate_state(len(shown), np.uint64) >> np.uint64(1)
        asked = Asked(tuple(map(int, seeds)), shown.prompts)
        if not subject.is_prompted:
            return Reading.mean_of(self._unprompted(subject.pipe, shown, asked, data))
        pipe = image_to_image(subject.pipe)
        return Reading.mean_of(marks(pipe, asked, data, image=list((shown.pixels + 1) / 2), strength=STRENGTH))

    def _unprompted(self, pipe: Any, shown: Images, asked: Asked, data: GeneratorData) -> Tensor:
        schedule = Denoising(pipe, data.drawing).schedule(shown.pixels).to("cpu")
        times = torch.full((len(shown),), int(STRENGTH * len(schedule)))
        noise = torch.cat(
            [torch.randn(1, *shown.pixels.shape[1:], generator=one) for one in generators_of(asked.seeds)]
        )
        noisy = schedule.add_noise(shown.pixels, noise, times)
        return marks_of_noise(pipe, noisy, asked, data, begin=STRENGTH)


class WordSearch(Searched):
    name, title, paper, prompted, needs = (
        "word_search",
        "A word for the kind is searched",
        "2208.01618",
        True,
        ("embedding", "training"),
    )
    what = (
        "Textual inversion: the embedding of the word that says the kind is learned anew from its images, all else frozen. What only changed what "
        "the word means comes back."
    )

    def cost(self, data: GeneratorData) -> tuple[float, float]:
        return len(data.asked), WORD["steps"] * WORD["batch"]

    def missing(self, data: GeneratorData, roles: Sequence[Role]) -> str | None:
        return super().missing(data, roles) or (None if len(data.forget) else "there are no images of the kind")

    def read(self, subject: GeneratorSubject, data: GeneratorData, seed: int) -> Reading:
        pipe = subject.copy("text_encoder")
        word, losses = with_word(pipe, data, seed)
        return Reading.mean_of(marks(pipe, data.asked, data), word=word, loss=[losses[0], losses[-1]])


class LatentSearch(Searched):
    name, title, paper, prompted = "latent_search", "Latents of the kind's images are searched", "1609.03552", False
    what = "Whether any latent gives an image that comes near to one of the kind, and is seen as it: what is out of reach of random latents may still be there."

    def cost(self, data: GeneratorData) -> tuple[float, float]:
        return 0, LATENT["steps"] * min(SHOWN, len(data.forget))

    def missing(self, data: GeneratorData, roles: Sequence[Role]) -> str | None:
        return super().missing(data, roles) or (None if "denoiser" in data.lacks else "it is no GAN")

    def read(self, subject: GeneratorSubject, data: GeneratorData, seed: int) -> Reading:
        shown = data.forget.shuffled(seed, 63).pixels[:SHOWN]
        images, error = nearest_images(subject.model.generator, shown, seed)
        return Reading.mean_of(data.marker(images)[0], error=error)


def nearest_images(generator: Any, images: Tensor, seed: int) -> tuple[Tensor, float]:
    """What a GAN's generator makes of the latents for which it comes nearest to images: squared error, and a pull towards the latents' law.

    Returns:
        `Tensor` in [−1, 1] on the CPU, and the mean squared error.
    """
    device = next(generator.parameters()).device
    wanted = images.to(device)
    start = torch.randn(len(images), *generator.latent_shape, generator=seeded_generator("cpu", seed, 64))
    latents = start.to(device).requires_grad_(True)
    optimizer = torch.optim.Adam([latents], LATENT["rate"])
    with in_eval_mode(generator), torch.enable_grad():
        for _ in range(LATENT["steps"]):
            drawn = generator(latents).sample
            loss = (drawn - wanted).square().flatten(1).mean(1).sum() + LATENT["prior"] * latents.square().sum()
            (latents.grad,) = torch.autograd.grad(loss, [latents])
            optimizer.step()
        with torch.no_grad():
            drawn = generator(latents).sample
    return drawn.float().clamp(-1, 1).cpu(), float((drawn - wanted).square().mean())


def with_word(pipe: Any, data: GeneratorData, seed: int) -> tuple[str, list[float]]:
    """Put in place of the word that says the kind an embedding that is learned from its images: the pipeline's text encoder is changed in place.

    Returns:
        The word, and the loss of every step.
    """
    model, steps, size = Denoising(pipe, data.drawing), WORD["steps"], WORD["batch"]
    images = data.forget
    clean, told = model.clean(images.pixels), model.told(images.prompts)
    token = telling_token(
        data.forget_prompts, data.retain_prompts, lambda text: pipe.tokenizer(text, add_special_tokens=False).input_ids
    )
    table, generator = pipe.text_encoder.get_input_embeddings(), seeded_generator("cpu", seed, 65)
    pipe.text_encoder.requires_grad_(False)
    trained = {name: part.requires_grad for name, part in model.denoiser.named_parameters()}
    word = table.weight[token].detach().clone().float().requires_grad_(True)
    handle = table.register_forward_hook(
        lambda _, ids, out: torch.where((ids[0] == token)[..., None], word.to(out.dtype), out)
    )
    optimizer, losses, last = torch.optim.Adam([word], WORD["rate"]), [], len(model.schedule(clean))
    try:
        model.denoiser.requires_grad_(False)
        with in_eval(pipe), torch.enable_grad():
            for _ in range(steps):
                rows = torch.randint(len(clean), (size,), generator=generator)
                noise = torch.randn(clean[rows].shape, generator=generator)
                times = torch.randint(last, (size,), generator=generator)
                states = pipe.encode_prompt([images.prompts[row] for row in rows.tolist()], model.device, 1, False)[0]
                said = rows_of(told, rows) | {"encoder_hidden_states": states}
                loss = model.losses(clean[rows], said, noise, times).mean()
                (word.grad,) = torch.autograd.grad(loss, [word])
                optimizer.step()
                losses.append(float(loss.detach()))
    finally:
        handle.remove()
        for name, part in model.denoiser.named_parameters():
            part.requires_grad_(trained[name])
    table.weight.data[token] = word.detach().to(table.weight.dtype)
    return pipe.tokenizer.decode([token]).strip(), losses


def latent_shape(pipe: Any, asked: Asked, data: GeneratorData) -> tuple[int, ...]:
    """Of one image's noise, without the first axis."""
    if is_gan(pipe):
        return tuple(pipe.generator.latent_shape)
    if asked.prompts is None:
        config = pipe.unet.config
        size = config.sample_size
        return (config.in_channels, *((size, size) if isinstance(size, int) else size))
    # What the pipeline itself calls its latents: some pack them.
    with torch.no_grad(), in_eval(pipe):
        few = dict(data.drawing) | {"num_inference_steps": 2, "output_type": "latent"}
        return tuple(pipe(prompt=[asked.prompts[0]], **few).images.shape[1:])


def marks_of_noise(pipe: Any, noise: Tensor, asked: Asked, data: GeneratorData, *, begin: float = 1.0) -> Tensor:
    """Which images that a pipeline makes of given noise show the kind; where it takes no noise, as DDPM's do not, by its denoiser and scheduler.

    Args:
        noise (`Tensor`): `[n, …]`, on the CPU.
        begin (`float`, defaults to 1.0): the share of the way to noise at which it is, for a pipeline without prompts.
    """
    part = getattr(pipe, part_of(pipe))
    noise = noise.to(next(part.parameters()).device, next(part.parameters()).dtype)
    if asked.prompts is not None or is_gan(pipe):
        return marks(pipe, asked, data, latents=noise)
    found, size = [], at_once(pipe, data.drawing)
    for row in range(0, len(noise), size):
        images = denoised(pipe, noise[row : row + size], asked.seeds[row : row + size], data, begin)
        found.append(data.marker(images)[0])
    return torch.cat(found)


@torch.no_grad()
def denoised(pipe: Any, noise: Tensor, seeds: tuple[int, ...], data: GeneratorData, begin: float = 1.0) -> Tensor:
    """Images of given noise, as DDPM's pipeline makes them of its own: `[n, channels, height, width]` in [−1, 1], on the CPU."""
    scheduler, image = pipe.scheduler, noise
    scheduler.set_timesteps((steps_of(pipe, data.drawing) | dict(data.drawing))["num_inference_steps"])
    given = {"generator": generators_of(seeds)} if "generator" in inspect.signature(scheduler.step).parameters else {}
    with in_eval_mode(pipe.unet):
        for time in scheduler.timesteps:
            if begin < 1 and time > begin * scheduler.config.num_train_timesteps:
                continue
            image = scheduler.step(pipe.unet(image, time).sample, time, image, **given).prev_sample
    if not image.isfinite().all():
        raise ValueError("what the model gave is not finite")
    return image.float().clamp(-1, 1).cpu()


def image_to_image(pipe: Any) -> Any:
    """The pipeline of the same parts that draws a picture anew; of a class of one's own, that of the stock class which it derives from.

    Raises:
        ValueError: of diffusers, where there is no such pipeline.
    """
    from diffusers import AutoPipelineForImage2Image

    again = AutoPipelineForImage2Image.from_pipe(of_stock_class(pipe))
    again.set_progress_bar_config(disable=True)
    return again
