"""Folds a LoRA adapter into the weights on the way to disk, so that what is published cannot be taken apart again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def merged(peft_model: PeftModel) -> PreTrainedModel:
    """The base model with `W + s·BA` for every adapted weight `W`, without any trace of PEFT.

    A copy, by PEFT's own `merge_and_unload`: merging and unmerging in place would leave rounding errors in `W`.

    Args:
        peft_model (`PeftModel`): plain LoRA on linear, embedding and convolution layers, with or without
            `modules_to_save`; not changed. What is active is folded, also inside `disable_adapter()`.

    Raises:
        ValueError: what is there cannot be folded exactly.
    """
    check_mergeable(peft_model)
    tied = _tied(peft_model.get_base_model())
    model = copy.deepcopy(peft_model).merge_and_unload(safe_merge=True)
    state = model.state_dict(keep_vars=True)
    for first, *others in tied:
        for other in others:
            if state[first] is not state[other] and not torch.equal(state[first], state[other]):
                raise _cannot_fold(f"a change of {other!r} away from {first!r}, which the base model ties to it,")
    model.tie_weights()
    return model


def _tied(base: PreTrainedModel) -> list[list[str]]:
    """Names that the base model ties to one tensor, without PEFT's."""
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if "lora_" not in name and ".modules_to_save." not in name:
            plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            names.setdefault(id(parameter), []).append(plain)
    return [found for found in names.values() if len(found) > 1]


def check_mergeable(peft_model: PeftModel) -> None:
    """Refuse what [`merged`] could not fold; cheap, so that it can be asked before training.

    Raises:
        ValueError: naming what is in the way, and `merge_adapter=False`.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import PeftType
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if not isinstance(peft_model, PeftModel):
        raise ValueError(
            f"peft_model={type(peft_model).__name__}: must be a PeftModel; use save_pretrained for others"
        )
    for config in (peft_model.peft_config[name] for name in peft_model.active_adapters):
        if config.peft_type != PeftType.LORA:
            raise _cannot_fold(f"a {config.peft_type.value} adapter")
    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            _check_layer(name, module)
        elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not isinstance(
            module, ModulesToSaveWrapper
        ):
            raise _cannot_fold(f"{type(module).__name__} at {name!r}")


def save_merged(peft_model: PeftModel, folder: str | Path) -> None:
    """Saves the base model with the adapter folded in, as `save_pretrained` would save one that was never adapted.

    Args:
        peft_model (`PeftModel`): see [`merged`]; not changed.
        folder (`str` or `Path`): loads with stock `from_pretrained` afterwards.

    Raises:
        ValueError: see [`merged`]; before anything is written.
    """
    merged(peft_model).save_pretrained(folder)


def _check_layer(name: str, layer: Any) -> None:
    from peft.tuners.lora import layer as lora

    # Exact types: layers for quantized bases derive from these or from LoraLayer, and add deltas in another way.
    if type(layer) not in (lora.Linear, lora.Embedding, lora.Conv1d, lora.Conv2d, lora.Conv3d):
        raise _cannot_fold(f"{type(layer).__module__}.{type(layer).__name__} at {name!r}")
    for adapter in layer.merged_adapters or _active(layer):
        if adapter in layer.lora_variant:
            raise _cannot_fold(f"{type(layer.lora_variant[adapter]).__name__} at {name!r}")
        if layer.lora_bias[adapter]:
            raise _cannot_fold(f"lora_bias at {name!r}")
        if getattr(layer.get_base_layer(), "groups", 1) > 1:
            raise _cannot_fold(f"a grouped convolution at {name!r}")


def _active(layer: Any) -> list[str]:
    """Adapters to add: none where they are merged, since the base weight holds them already."""
    return [] if layer.merged else [adapter for adapter in layer.active_adapters if adapter in layer.r]


def _cannot_fold(what: str) -> ValueError:
    return ValueError(
        f"merge_adapter=True: {what} cannot be folded into the weights; set merge_adapter=False to save the adapter apart"
    )
