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
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import nn

from ...files import loading
from ...hub.adapters import check_no_adapter
from ...training.checks import check_single_precision
from .noise import NoiseSchedule


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


logger = logging.getLogger(__name__)

ATTENTION_PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
# Pipelines, and classes derived from them, whose sampler asks the denoiser what training asks it. By name: to import them takes seconds.
PIPELINES = (
    "DDPMPipeline",
    "DDIMPipeline",
    "PNDMPipeline",
    "StableDiffusionPipeline",
    "LatentConsistencyModelPipeline",
)
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


def as_pipeline(model: Any, pipeline: Any, noise_scheduler: Any) -> tuple[DiffusionPipeline, str | None]:
    """`(pipeline, name)`, whose `unet` is what is trained.

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
    if not {kind.__name__ for kind in type(given).__mro__} & set(PIPELINES):
        raise ValueError(f"pipeline: {type(given).__name__} is not supported; pass one of {', '.join(PIPELINES)}")
    name = name or given.config.get("_name_or_path") or None
    check_denoiser(given.unet)
    check_no_adapter(given)
    if any(getattr(block, "b1", None) is not None for block in getattr(given.unet, "up_blocks", ())):
        raise ValueError(
            "pipeline: FreeU is on, which changes what its unet answers and is not saved with it; call disable_freeu()"
        )
    learned = "learned" in str(given.scheduler.config.get("variance_type"))
    if given.unet.config.out_channels != given.unet.config.in_channels and not learned and not is_prompted(given):
        raise ValueError(
            "pipeline: its unet answers with a variance too, which its scheduler does not use; give it a DDPMScheduler with "
            "variance_type='learned_range'"
        )
    if is_prompted(given):
        absent = [part for part in ("vae", "text_encoder", "tokenizer") if getattr(given, part, None) is None]
        if absent:
            raise ValueError(f"pipeline: {type(given).__name__} has no {absent[0]}, which a prompted model needs")
        width, told = given.text_encoder.config.hidden_size, given.unet.config.cross_attention_dim
        if given.unet.config.encoder_hid_dim_type == "text_proj":
            told = given.unet.config.encoder_hid_dim
        if {width} != set(told if isinstance(told, list | tuple) else (told,)):
            raise ValueError(
                f"pipeline: its text_encoder gives vectors of {width} numbers, its unet takes cross_attention_dim={told}"
            )
    elif "generator" not in inspect.signature(given.scheduler.step).parameters and isinstance(given, DDPMPipeline):
        raise ValueError(
            f"pipeline: DDPMPipeline cannot draw with {type(given.scheduler).__name__}; give it a DDPMScheduler or a DDIMScheduler"
        )
    for part in ("unet", "vae"):
        unfuse(getattr(given, part, None))
    return given, name


def _loaded(name: str) -> Any:
    folder = Path(name)
    with loading("pipeline", name, "a pipeline"):
        if not (folder / "config.json").is_file() or (folder / "model_index.json").is_file():
            return DiffusionPipeline.from_pretrained(name)
    kinds = {kind.__name__: kind for kind in (UNet2DModel, UNet2DConditionModel)}
    kind = json.loads((folder / "config.json").read_text()).get("_class_name")
    if kind not in kinds:
        raise ValueError(f"model={name!r}: its config names {kind}, not one of {', '.join(kinds)}")
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


def choose_trainable(unet: nn.Module, trainable: Sequence[str], peft_config: Any = None, **lora: int) -> None:
    """Let training change the parameters that `trainable` names, and no others.

    Args:
        unet (`UNet2DModel` | `UNet2DConditionModel`): changed in place.
        trainable (`Sequence[str]`): `all`, `cross_attention`, `lora`, or patterns of parameter names.
        peft_config (`peft.LoraConfig`, *optional*): a LoRA of one's own.
        lora (`int`): `r` and `lora_alpha` of the LoRA that `lora` means.

    Raises:
        ValueError: nothing has such a name, or the model takes no LoRA.
    """
    if peft_config is not None or "lora" in trainable:
        if peft_config is None and len(trainable) > 1:
            raise ValueError(f"trainable={list(trainable)}: 'lora' stands alone")
        if not hasattr(unet, "add_adapter"):
            raise ValueError(f"trainable: {type(unet).__name__} takes no LoRA in diffusers; use 'all' or patterns")
        if peft_config is None:
            from peft import LoraConfig

            peft_config = LoraConfig(target_modules=ATTENTION_PROJECTIONS, **lora)
        unet.requires_grad_(False)
        unet.add_adapter(peft_config)
        for parameter in unet.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()  # its steps are lost in 16 bits
        return
    patterns = {"all": "*", "cross_attention": "*.attn2.*"}
    chosen = [patterns.get(pattern, pattern) for pattern in trainable]
    names = [name for name, _ in unet.named_parameters()]
    for pattern, given in zip(chosen, trainable, strict=True):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"trainable: no parameter's name fits {given!r} (one is called {names[0]!r})")
    trained = {name for name in names if any(fnmatchcase(name, pattern) for pattern in chosen)}
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
    for key, plain in TOLD_MORE.items():
        value = unet.config.get(key)
        if value not in plain:
            raise ValueError(
                f"model: its {key}={value!r} needs more than an image and a prompt, which is not supported yet"
            )
    if not unet.config.sample_size:
        raise ValueError("model: its config has no sample_size, so how large its images are is not known; set it")
    channels, answered = unet.config.in_channels, unet.config.out_channels
    if answered not in (channels, 2 * channels):  # inpainting, upscaling, depth; twice as many: a learned variance
        raise ValueError(
            f"model: it sees {channels} channels and answers {answered}; only denoisers of an image alone are supported"
        )


def is_prompted(pipeline: DiffusionPipeline) -> bool:
    """Whether its denoiser is told what to draw."""
    return isinstance(pipeline.unet, UNet2DConditionModel)


def guidance_of(pipeline: DiffusionPipeline, guidance_scale: float | None) -> float:
    """The scale of classifier-free guidance that a prompted pipeline draws with: what is given, or its own default."""
    if guidance_scale is not None:
        return guidance_scale
    return inspect.signature(pipeline.__call__).parameters["guidance_scale"].default


def unfuse(model: nn.Module | None) -> None:
    """Take apart again, in place, the attention projections that `fuse_qkv_projections` made one of: the fused ones would be trained, and
    the single ones saved.
    """
    for layer in model.modules() if model is not None else ():
        if not isinstance(layer, Attention):
            continue
        for fused, names in (("to_qkv", ("to_q", "to_k", "to_v")), ("to_kv", ("to_k", "to_v"))):
            if not hasattr(layer, fused):
                continue
            if isinstance(layer.processor, FusedAttnProcessor2_0):  # else what it holds is not used any more
                whole, single = getattr(layer, fused), [getattr(layer, name) for name in names]
                with torch.no_grad():
                    for kind in ("weight", "bias") if whole.bias is not None else ("weight",):
                        parts = [getattr(projection, kind) for projection in single]
                        pieces = getattr(whole, kind).split([len(part) for part in parts])
                        for part, piece in zip(parts, pieces, strict=True):
                            part.copy_(piece)
            delattr(layer, fused)
        layer.fused_projections = False
        if isinstance(layer.processor, FusedAttnProcessor2_0):
            layer.set_processor(AttnProcessor2_0())


def resolution(pipeline: DiffusionPipeline) -> tuple[int, int, int]:
    """`(channels, height, width)` of the images that a pipeline makes."""
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    if is_prompted(pipeline):
        scale = pipeline.vae_scale_factor
        return pipeline.vae.config.in_channels, height * scale, width * scale
    return pipeline.unet.config.in_channels, height, width
