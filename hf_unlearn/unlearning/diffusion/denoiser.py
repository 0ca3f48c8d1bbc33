"""Which denoiser is trained, and which of its parameters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from torch import nn

from ...files import loading
from ...hub.loading import diffusion_task
from ...training.checks import check_single_precision


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


ATTENTION_PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


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
    name = name or given.config.get("_name_or_path") or None
    if getattr(given, "unet", None) is None:
        parts = ", ".join(given.components) or "nothing"
        raise ValueError(f"pipeline: {type(given).__name__} has no unet to train (it has {parts})")
    check_denoiser(given.unet)
    if diffusion_task(type(given)) is None or (not is_prompted(given) and len(given.components) > 2):
        raise ValueError(f"pipeline: {type(given).__name__} does not draw images from noise or a prompt alone")
    if is_prompted(given):
        absent = [part for part in ("vae", "text_encoder", "tokenizer") if getattr(given, part, None) is None]
        if absent:
            raise ValueError(f"pipeline: {type(given).__name__} has no {absent[0]}, which a prompted model needs")
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
    kind = DDIMPipeline if isinstance(noise_scheduler, DDIMScheduler) else DDPMPipeline
    return kind(unet=unet, scheduler=noise_scheduler)


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
        if getattr(unet, "peft_config", None):
            raise ValueError("trainable: the model has an adapter already; fuse it or unload it first")
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
    needs = next(
        (key for key in ("class_embed_type", "num_class_embeds", "addition_embed_type") if unet.config.get(key)), None
    )
    if needs:
        raise ValueError(
            f"model: its {needs}={unet.config[needs]!r} needs more than an image and a prompt, which is not supported yet"
        )
    channels, answered = unet.config.in_channels, unet.config.out_channels
    if answered not in (channels, 2 * channels):  # inpainting, upscaling, depth; twice as many: a learned variance
        raise ValueError(
            f"model: it sees {channels} channels and answers {answered}; only denoisers of an image alone are supported"
        )


def is_prompted(pipeline: DiffusionPipeline) -> bool:
    """Whether its denoiser is told what to draw."""
    return isinstance(pipeline.unet, UNet2DConditionModel)


def resolution(pipeline: DiffusionPipeline) -> tuple[int, int, int]:
    """`(channels, height, width)` of the images that a pipeline makes."""
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    if is_prompted(pipeline):
        scale = pipeline.vae_scale_factor
        return pipeline.vae.config.in_channels, height * scale, width * scale
    return pipeline.unet.config.in_channels, height, width
