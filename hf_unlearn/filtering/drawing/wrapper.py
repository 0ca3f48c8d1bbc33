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
    """Its attributes are those of `pipeline`, read and set, unless they are its own, or private methods, or methods that draw.

    Args:
        _own (`tuple[str, ...]`): of the class: names of attributes that are set here.
    """

    _own: tuple[str, ...] = ("pipeline", "internal_dict")

    @property
    def model_cpu_offload_seq(self) -> Any:
        return self.pipeline.model_cpu_offload_seq

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

    def register_modules(self, **modules: Any) -> None:
        """Of the pipeline inside, but for its own."""
        own = {name: value for name, value in modules.items() if name in self._own}
        for name, value in own.items():
            setattr(self, name, value)
        self.pipeline.register_modules(**{name: value for name, value in modules.items() if name not in own})

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("pipeline")
        # Of private ones only values that were set on it: `_interrupt` for instance, and none of its methods.
        if inner is None or self._is_own(name) or (name.startswith("_") and name not in vars(inner)):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in _DRAWING and hasattr(inner, name):
            raise AttributeError(f"{name}: draws past the filter; call the pipeline, or ask .pipeline for it")
        return getattr(inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_own(name):
            super().__setattr__(name, value)
        else:
            setattr(self.pipeline, name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_own(name):
            super().__delattr__(name)
        else:
            delattr(self.pipeline, name)

    def _is_own(self, name: str) -> bool:
        return "pipeline" not in self.__dict__ or name.startswith("__") or name.removeprefix("_") in self._own


def _passed_on(name: str):
    @functools.wraps(getattr(DiffusionPipeline, name))
    def method(self, *args, **kwargs):
        return getattr(self.pipeline, name)(*args, **kwargs)

    return method


for _name in _PASSED_ON:
    setattr(PipelineWrapper, _name, _passed_on(_name))
