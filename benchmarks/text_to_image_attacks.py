"""What may bring back a concept that a text-to-image pipeline has forgotten: more training, a searched embedding, a picture to begin with,
another negative prompt, coarser weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from text_to_image_figures import GUIDANCE, NOISE, STEPS, Case, as_images, attributes, with_concept
from torch import Tensor, nn

from hf_unlearn.examples.captions import say
from hf_unlearn.examples.text_to_image import encoded
from hf_unlearn.training.noise import NoiseSchedule


FINETUNING = {"rate": 1e-4, "batch": 32}  # a tenth of the highest rate that the pipeline was trained with
BENIGN, RELEARNING, FEW = 50, 20, 5  # steps on pictures of other things; steps on so few pictures of the concept
SEARCH = {"steps": 300, "rate": 0.01, "batch": 16}  # of textual inversion (arXiv 2208.01618)
STRENGTH = 0.6  # of img2img: the share of the way to noise from which a picture is drawn anew
HALVES = 24  # pictures in half precision, which is slow on a CPU


class Avoiding(StableDiffusionPipeline):
    """Draws with a negative prompt in every call; nothing of the weights is changed."""

    unwanted = ""

    def __call__(self, prompt, **given):
        return super().__call__(prompt, negative_prompt=[self.unwanted] * len(prompt), **given)


def avoiding(pipeline: DiffusionPipeline, unwanted: str) -> Avoiding:
    """The pipeline with that negative prompt, in the place of one that it may have."""
    guided = Avoiding(**pipeline.components, requires_safety_checker=False)
    guided.unwanted = unwanted
    return guided


def _loss(pipeline: DiffusionPipeline, latents: Tensor, prompts: Sequence[str], generator: torch.Generator) -> Tensor:
    """Squared error of the guessed noise, a scalar."""
    schedule = NoiseSchedule.of(pipeline.scheduler)
    noise = torch.randn(latents.shape, generator=generator)
    times = torch.randint(len(schedule), (len(latents),), generator=generator)
    states, _ = pipeline.encode_prompt(list(prompts), "cpu", 1, do_classifier_free_guidance=False)
    answer = pipeline.unet(schedule.add_noise(latents, noise, times), times, encoder_hidden_states=states).sample
    return (answer - noise).square().mean()


def finetuned(
    pipeline: DiffusionPipeline, rows: Dataset, prompts: Sequence[str], steps: int, rate: float, batch: int, seed: int
) -> DiffusionPipeline:
    """Ordinary training of the U-Net on pictures and prompts, in place. Of few pictures each is several times in a batch."""
    latents, generator = encoded(pipeline.vae, as_images(rows)), torch.Generator().manual_seed(seed)
    pipeline.text_encoder.requires_grad_(False)
    unet = pipeline.unet.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(unet.parameters(), rate)
    for _ in range(steps):
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        loss = _loss(pipeline, latents[chosen], [prompts[row] for row in chosen.tolist()], generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
    unet.eval()
    return pipeline


def benign(
    pipeline: DiffusionPipeline, pictures: Dataset, case: Case, seed: int, steps: int = BENIGN
) -> DiffusionPipeline:
    """Trained on other things, with captions of all kinds."""
    rows = with_concept(pictures, case, shown=False)
    return finetuned(pipeline, rows, rows["caption"][:], steps, seed=seed, **FINETUNING)


def relearnt(
    pipeline: DiffusionPipeline, pictures: Dataset, case: Case, seed: int, steps: int = RELEARNING
) -> DiffusionPipeline:
    """Trained on a few pictures of the concept, in the usual wording."""
    rows = with_concept(pictures, case).select(range(FEW))
    return finetuned(pipeline, rows, [say(shown) for shown in attributes(rows)], steps, seed=seed, **FINETUNING)


def searched(
    pipeline: DiffusionPipeline, pictures: Dataset, case: Case, seed: int, steps: int = SEARCH["steps"]
) -> DiffusionPipeline:
    """Textual inversion: the embedding of a new word, which begins as the concept's and is asked for in its place, is learnt from pictures of
    the concept with all weights at hand; nothing else is changed.
    """
    rows = with_concept(pictures, case)
    latents, generator = encoded(pipeline.vae, as_images(rows)), torch.Generator().manual_seed(seed)
    prompts = [say(shown) for shown in attributes(rows)]
    (token,) = pipeline.tokenizer(case.word, add_special_tokens=False).input_ids
    table = pipeline.text_encoder.get_input_embeddings()
    for part in (pipeline.unet, pipeline.text_encoder):
        part.requires_grad_(False)
    word = table.weight[token].detach().clone().requires_grad_(True)
    hook = table.register_forward_hook(lambda _, ids, out: torch.where((ids[0] == token)[..., None], word, out))
    optimizer = torch.optim.Adam([word], SEARCH["rate"])
    for _ in range(steps):
        chosen = torch.randint(len(latents), (SEARCH["batch"],), generator=generator)
        loss = _loss(pipeline, latents[chosen], [prompts[row] for row in chosen.tolist()], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hook.remove()
    table.weight.data[token] = word.detach()  # so that the concept's word stands for the new one
    return pipeline


@torch.no_grad()
def from_pictures(pipeline: DiffusionPipeline, pictures: Dataset, case: Case, steps: int = STEPS) -> Tensor:
    """Pictures of the concept, drawn anew from partly noisy ones with prompts that say what they show."""
    rows, number = with_concept(pictures, case), case.number
    rows = rows.select([row % len(rows) for row in range(number)])
    again = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    unwanted = getattr(pipeline, "unwanted", None)
    drawn, prompts, images = [], [say(shown) for shown in attributes(rows)], rows["image"][:]
    seeds = np.random.SeedSequence(NOISE).generate_state(number, np.uint64)
    for begin in range(0, number, 64):
        part = slice(begin, begin + 64)
        some = prompts[part]
        drawn.append(
            again(
                some,
                images[part],
                STRENGTH,
                steps,
                guidance_scale=GUIDANCE,
                negative_prompt=None if unwanted is None else [unwanted] * len(some),
                generator=[torch.Generator().manual_seed(int(value) % 2**63) for value in seeds[part]],
                output_type="pt",
            ).images
        )
    return torch.cat(drawn).float().nan_to_num() * 2 - 1


@torch.no_grad()
def rounded_to_int8(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Weights of all linear and convolutional layers of U-Net and text encoder are rounded to 8 bits, symmetric, with a scale for each output
    channel, in place.
    """
    for part in (pipeline.unet, pipeline.text_encoder):
        for layer in part.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                scale = (layer.weight.flatten(1).abs().amax(1) / 127).clamp(min=torch.finfo(layer.weight.dtype).tiny)
                scale = scale.view(-1, *[1] * (layer.weight.ndim - 1))
                layer.weight.copy_((layer.weight / scale).round() * scale)
    return pipeline


def in_half_precision(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """U-Net, text encoder and VAE in float16, of which this CPU has kernels."""
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        part.half()
    return pipeline
