"""Which denoiser is trained, and which of its parameters."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn

from ...files import loading
from ...hub.adapters import check_no_adapter
from ...training.checks import check_single_precision
from ...training.noise import NoiseSchedule
from .architecture import Architecture, check_told
from .fused import unfuse
from .pipelines import architecture_of
from .unets import TOLD_MORE


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


logger = logging.getLogger(__name__)

# What makes a schedule, whichever its sampler.
SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


def as_pipeline(model: Any, pipeline: Any, noise_scheduler: Any) -> tuple[DiffusionPipeline, str | None]:
    """`(pipeline, name)`, whose denoiser is what is trained.

    Args:
        model (`UNet2DModel` | `UNet2DConditionModel` | `DiffusionPipeline` | `str`, *optional*): a denoiser, or what
            `pipeline` may be too.
        pipeline (`DiffusionPipeline` | `str`, *optional*): a pipeline, or the folder or id of one.
        noise_scheduler (*optional*): of a denoiser that comes without a pipeline.

    Raises:
        ValueError: neither is given, or they do not make a pipeline that can be trained here.
    """
    if model is not None and pipeline is not None:
        raise ValueError("model: given beside pipeline; keep one of them")
    given = model if pipeline is None else pipeline
    if given is None:
        raise ValueError("pipeline: missing; pass a pipeline (or its folder or id), or a model with noise_scheduler=")
    name = given if isinstance(given, str) else None
    if isinstance(given, str):
        given = _loaded(given)
    if isinstance(given, nn.Module):
        check_denoiser(given)
        name = name or given.config.get("_name_or_path") or None
        given = _around(given, noise_scheduler)
    elif not isinstance(given, DiffusionPipeline):
        raise ValueError(f"pipeline: {type(given).__name__} is no pipeline of diffusers; pass one, or a UNet2DModel")
    elif noise_scheduler is not None:
        raise ValueError("noise_scheduler: the pipeline has its own; leave it out")
    architecture = architecture_of(given)
    name = name or given.config.get("_name_or_path") or None
    architecture.check("pipeline")
    _check_image(architecture.denoiser)
    check_no_adapter(given)
    _check_draws(given, architecture)
    for part in (architecture.part, "vae"):
        unfuse(getattr(given, part, None))
    architecture.settle()
    return given, name


def _check_draws(pipeline: DiffusionPipeline, architecture: Architecture) -> None:
    """Refuse a pipeline that cannot draw, or does it with other answers than its denoiser's."""
    denoiser = architecture.denoiser
    if any(getattr(block, "b1", None) is not None for block in getattr(denoiser, "up_blocks", ())):
        raise ValueError(
            "pipeline: FreeU is on, which changes what its unet answers and is not saved with it; call disable_freeu()"
        )
    if architecture.is_prompted:
        if getattr(pipeline, "vae", None) is None:
            raise ValueError(f"pipeline: {type(pipeline).__name__} has no vae; load the pipeline with it")
        return
    learned = "learned" in str(pipeline.scheduler.config.get("variance_type"))
    if denoiser.config.out_channels != denoiser.config.in_channels and not learned:
        raise ValueError(
            "pipeline: its unet answers with a variance too, which its scheduler does not use; give it a DDPMScheduler with "
            "variance_type='learned_range'"
        )
    if "generator" not in inspect.signature(pipeline.scheduler.step).parameters and isinstance(pipeline, DDPMPipeline):
        raise ValueError(
            f"pipeline: DDPMPipeline cannot draw with {type(pipeline.scheduler).__name__}; give it a DDPMScheduler or a DDIMScheduler"
        )


def _loaded(name: str) -> Any:
    folder = Path(name)
    with loading("pipeline", name, "a pipeline"):
        if not (folder / "config.json").is_file() or (folder / "model_index.json").is_file():
            return DiffusionPipeline.from_pretrained(name)
    kinds = {kind.__name__: kind for kind in (UNet2DModel, UNet2DConditionModel)}
    config = json.loads((folder / "config.json").read_text())
    kind = config.get("_class_name") or config.get("model_type")
    if kind not in kinds:
        raise ValueError(
            f"model={name!r}: its config names {kind}, not one of {', '.join(kinds)}; give a whole pipeline"
        )
    with loading("model", name, "a denoiser"):
        return kinds[kind].from_pretrained(name)


def _around(unet: nn.Module, noise_scheduler: Any) -> DiffusionPipeline:
    """The plainest pipeline around a denoiser."""
    if isinstance(unet, UNet2DConditionModel):
        raise ValueError("model: a prompted denoiser needs its VAE and text encoder; pass the whole pipeline=")
    if noise_scheduler is None:
        raise ValueError(
            "noise_scheduler: missing; pass the one that the model was trained with, or the whole pipeline="
        )
    if isinstance(noise_scheduler, DDPMScheduler):
        return DDPMPipeline(unet=unet, scheduler=noise_scheduler)
    NoiseSchedule.of(noise_scheduler)  # refuses what is none
    if not isinstance(noise_scheduler, DDIMScheduler):
        # No stock pipeline of images alone draws with UniPC, Euler and the like; what counts for training is the schedule. Not
        # `from_config`, which takes DDIM's own defaults for all that was left at the other's (diffusers 0.42).
        logger.info("noise_scheduler: drawing with DDIM on the schedule of %s", type(noise_scheduler).__name__)
        config = noise_scheduler.config
        schedule = {key: config[key] for key in SCHEDULE if key in config}
        if config.get("beta_schedule") not in ("linear", "scaled_linear", "squaredcos_cap_v2"):  # which DDIM knows
            schedule["trained_betas"] = noise_scheduler.betas.tolist()
        noise_scheduler = DDIMScheduler(**schedule)
    return DDIMPipeline(unet=unet, scheduler=noise_scheduler)


def choose_trainable(
    architecture: Architecture, trainable: Sequence[str], peft_config: Any = None, **lora: int
) -> None:
    """Let training change the parameters that `trainable` names, and no others.

    Args:
        architecture (`Architecture`): whose denoiser is changed in place.
        trainable (`Sequence[str]`): `all`, `cross_attention` (whatever reads the prompt in this architecture), `lora`, or patterns of
            parameter names; with a `!` before it, all but these.
        peft_config (`peft.LoraConfig`, *optional*): a LoRA of one's own.
        lora (`int`): `r` and `lora_alpha` of the LoRA that `lora` means.

    Raises:
        ValueError: nothing has such a name or nothing is left, or the model takes no LoRA.
    """
    unet = architecture.denoiser
    if peft_config is not None or "lora" in trainable:
        if peft_config is None and len(trainable) > 1:
            raise ValueError(f"trainable={list(trainable)}: 'lora' stands alone")
        if not hasattr(unet, "add_adapter"):
            raise ValueError(f"trainable: {type(unet).__name__} takes no LoRA in diffusers; use 'all' or patterns")
        if peft_config is None:
            from peft import LoraConfig

            peft_config = LoraConfig(target_modules=list(architecture.lora_layers), **lora)
        unet.requires_grad_(False)
        unet.add_adapter(peft_config)
        for parameter in unet.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()  # its steps are lost in 16 bits
        return
    words = {"all": ("*",), "cross_attention": architecture.reads_prompts}
    names = [name for name, _ in unet.named_parameters()]
    fitting: dict[bool, set[str]] = {True: set(), False: set()}  # what is left out, and what is not
    for given in trainable if any(given[:1] != "!" for given in trainable) else ["all", *trainable]:
        plain = given.removeprefix("!")
        patterns = words.get(plain, (plain,))
        fit = {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
        if not fit:
            raise ValueError(f"trainable: no parameter's name fits {given!r} (one is called {names[0]!r})")
        fitting[given != plain] |= fit
    trained = fitting[False] - fitting[True]
    if not trained:
        raise ValueError(f"trainable={list(trainable)}: leaves every parameter out; name some")
    check_single_precision([p for name, p in unet.named_parameters() if name in trained], other=", or train a LoRA")
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in trained)


def check_denoiser(unet: Any) -> None:
    """Refuse what is no denoiser that can be trained here.

    Raises:
        ValueError: another architecture, or one that must be told more than a prompt.
    """
    if not isinstance(unet, (UNet2DModel, UNet2DConditionModel)):
        raise ValueError(
            f"model: {type(unet).__name__} is not supported; pass a UNet2DModel, a UNet2DConditionModel or their pipeline"
        )
    check_told(unet, TOLD_MORE, "model: it")
    _check_image(unet)


def _check_image(denoiser: nn.Module) -> None:
    """Refuse a denoiser that sees or answers something else than one image of known size."""
    if "sample_size" in denoiser.config and not denoiser.config.sample_size:
        raise ValueError("model: its config has no sample_size, so how large its images are is not known; set it")
    channels = denoiser.config.in_channels
    answered = denoiser.config.out_channels or channels
    if answered not in (channels, 2 * channels):  # inpainting, upscaling, depth; twice as many: a learned variance
        raise ValueError(
            f"model: it sees {channels} channels and answers {answered}; only denoisers of an image alone are supported"
        )


def is_prompted(pipeline: DiffusionPipeline) -> bool:
    """Whether its denoiser is told what to draw."""
    return architecture_of(pipeline).is_prompted


def resolution(pipeline: DiffusionPipeline) -> tuple[int, int, int]:
    """`(channels, height, width)` of the images that a pipeline makes."""
    return architecture_of(pipeline).resolution
