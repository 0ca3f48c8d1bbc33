"""Which pipelines are known: the one table of them, for what is trained and what is edited."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ...hub.adapters import check_no_adapter
from .architecture import Architecture
from .diffusion_transformers import DiT, Flux, PixArt, StableDiffusion3
from .fused import unfuse
from .text_side import TextLayer, TextSide
from .unets import BesideControlNet, ImagesAlone, StableDiffusion, StableDiffusionXL, XLBesideControlNet


if TYPE_CHECKING:
    from collections.abc import Mapping


# By the name of the pipeline, or of a class that it derives from: to import them takes seconds.
PIPELINES: dict[str, type[Architecture]] = {
    "DDPMPipeline": ImagesAlone,
    "DDIMPipeline": ImagesAlone,
    "PNDMPipeline": ImagesAlone,
    "StableDiffusionPipeline": StableDiffusion,
    "LatentConsistencyModelPipeline": StableDiffusion,
    "StableDiffusionControlNetPipeline": BesideControlNet,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusionXLControlNetPipeline": XLBesideControlNet,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "DiTPipeline": DiT,
}
TEXT_SIDES: dict[str, type[TextSide]] = {name: kind for name, kind in PIPELINES.items() if issubclass(kind, TextSide)}


def architecture_of(
    pipe: Any, argument: str = "pipeline", known: Mapping[str, type[Architecture]] = PIPELINES
) -> Architecture:
    """The architecture of a pipeline. Nothing is looked at but its class.

    Args:
        pipe (`DiffusionPipeline`): of a known class, or one derived from it.
        argument (`str`): what to call it in an error.

    Raises:
        ValueError: another pipeline.
    """
    for kind in type(pipe).__mro__:
        if kind.__name__ in known:
            return known[kind.__name__](pipe)
    names = ", ".join(name.removesuffix("Pipeline") for name in known)
    raise ValueError(f"{argument}: {type(pipe).__name__} is not supported; pass a pipeline of one of {names}")


def text_side_of(pipe: Any) -> TextSide:
    """The text side of a pipeline whose layers that read text are to be changed.

    Raises:
        ValueError: another pipeline, a part is missing, an adapter is loaded, or the weights that read text cannot be changed: quantised, or
            offloaded one by one.
    """
    side = architecture_of(pipe, "pipe", TEXT_SIDES)
    side.check("pipe")
    check_no_adapter(pipe)
    unfuse(side.denoiser)
    for layer in side.layers:
        _check_weight(layer, side.part)
    return side


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
