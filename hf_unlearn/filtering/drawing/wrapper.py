"""A pipeline around another one, which for everything but a call is that other one."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import DiffusionPipeline


# Methods that draw, which is not for the wrapper to pass on: GANPipeline's, and those of diffusers 0.42.
_DRAWING = ("draw", "decode_latents", "text_to_image", "image_variation", "dual_guided", "interpolate")
# DiffusionPipeline defines these, so __getattr__ is never asked for them.
_PASSED_ON = (
    "disable_attention_slicing",
    "disable_xformers_memory_efficient_attention",
    "enable_attention_slicing",
    "enable_group_offload",
    "enable_model_cpu_offload",
    "enable_sequential_cpu_offload",
    "enable_xformers_memory_efficient_attention",
    "maybe_free_model_hooks",
    "progress_bar",
    "remove_all_hooks",
    "reset_device_map",
    "set_attention_slice",
    "set_progress_bar_config",
    "set_use_memory_efficient_attention_xformers",
)


class PipelineWrapper(DiffusionPipeline):
    """Its attributes are those of `pipeline`, read and set, unless they are its own or private, or methods that draw."""

    def to(self, *args, **kwargs) -> PipelineWrapper:
        self.pipeline.to(*args, **kwargs)
        return self

    @property
    def device(self) -> torch.device:
        return self.pipeline.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pipeline.dtype

    @property
    def hf_device_map(self) -> Any:
        return self.pipeline.hf_device_map

    @property
    def _execution_device(self) -> torch.device:
        return self.pipeline._execution_device

    def __getattr__(self, name: str) -> Any:
        # Private ones are left alone: the configuration of diffusers 0.42 is one, and so is what copy asks for.
        if name.startswith("_") or "pipeline" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in _DRAWING and hasattr(self.pipeline, name):
            raise AttributeError(f"{name}: draws past the filter; call the pipeline, or ask .pipeline for it")
        return getattr(self.pipeline, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        if own or not hasattr(self.__dict__.get("pipeline"), name):
            super().__setattr__(name, value)
        else:
            setattr(self.pipeline, name, value)


def _passed_on(name: str):
    @functools.wraps(getattr(DiffusionPipeline, name))
    def method(self, *args, **kwargs):
        return getattr(self.pipeline, name)(*args, **kwargs)

    return method


for _name in _PASSED_ON:
    setattr(PipelineWrapper, _name, _passed_on(_name))
