"""Folds a LoRA adapter into the weights on the way to disk, so that what is published cannot be taken apart again."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


UNFUSED = "which can be taken off; fuse it (fuse_lora, then unload_lora_weights), save the pipeline"


@torch.no_grad()
def merged_state_dict(peft_model: PeftModel) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """`W + s·BA` for every adapted weight `W`, under the names that the base model has without PEFT.

    The model is only read: merging and unmerging in place would leave rounding errors in `W`. Extra memory is one copy
    of the adapted weights; everything else is shared with the model. Weights that bitsandbytes holds in 4 bits (QLoRA, arXiv 2305.14314) become
    what they stand for, in the dtype that they were quantised from: what was trained was a change of these.

    Args:
        peft_model (`PeftModel`): plain LoRA on linear, embedding and convolution layers, with or without
            `modules_to_save`. What is active is folded, also inside `disable_adapter()`.

    Returns:
        `tuple`: the base model, which still holds the adapter (of a quantised one an empty one that is not), and its state dict, which
            does not.

    Raises:
        ValueError: what is there cannot be folded exactly.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    check_mergeable(peft_model)
    base = peft_model.get_base_model()
    entries = base.state_dict(keep_vars=True)  # first: it takes bitsandbytes' weights out of their packing for the CPU
    wrappers: dict[str, nn.Module] = {}
    folded: dict[str, torch.Tensor] = {}
    of_quantisation: list[str] = []
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            folded[f"{name}.base_layer.weight"] = _fold(module)
        elif is_quantised(module):
            folded.setdefault(f"{name}.weight", _whole_weight(module))
        if is_quantised(module):
            of_quantisation.append(f"{name}.weight.")
        if isinstance(module, (LoraLayer, ModulesToSaveWrapper)):
            wrappers[name] = module

    state: dict[str, torch.Tensor] = {}
    originals: dict[int, list[str]] = {}  # names that the base model ties to one tensor
    for key, tensor in entries.items():
        if key.startswith(tuple(of_quantisation)):
            continue
        name, is_original, is_active = _without_wrappers(key, wrappers)
        if is_original and isinstance(tensor, torch.Tensor):
            originals.setdefault(id(tensor), []).append(name)
        if is_active:
            value = folded.get(key, tensor)
            state[name] = value.detach() if isinstance(value, torch.Tensor) else value

    for first, *others in originals.values():
        for other in others:
            if state[first] is not state[other] and not torch.equal(state[first], state[other]):
                raise _tie_broken(other, first)
            state[other] = state[first]  # one tensor again, which is how save_pretrained sees that they are tied
    return unquantised(base), state


def is_quantised(layer: nn.Module) -> bool:
    """Whether bitsandbytes holds the weight of a layer in 4 bits."""
    return type(getattr(layer, "weight", None)).__name__ == "Params4bit"


def unquantised(base: PreTrainedModel) -> PreTrainedModel:
    """The model, or of one with quantised weights an empty one like it that has none, of which weights from elsewhere are saved."""
    if not getattr(base, "is_quantized", False):
        return base
    config = copy.deepcopy(base.config)
    del config.quantization_config
    with torch.device("meta"):
        plain = type(base)(config)
    if base.can_generate():
        plain.generation_config = base.generation_config
    return plain


def check_mergeable(peft_model: PeftModel) -> None:
    """Refuse what [`merged_state_dict`] could not fold; cheap, so that it can be asked before training.

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
    if not any(getattr(config, "ensure_weight_tying", False) for config in peft_model.peft_config.values()):
        _check_ties(peft_model.get_base_model())


def check_no_adapter(pipeline: Any) -> None:
    """Refuse a pipeline of diffusers with an adapter in it, which `save_pretrained` of diffusers 0.42 would write apart, under names
    that no model has.

    Raises:
        ValueError: naming the component.
    """
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and any(isinstance(part, BaseTunerLayer) for part in component.modules()):
            raise ValueError(f"pipeline: {name} holds an adapter, {UNFUSED} again")


def save_merged(peft_model: PeftModel, folder: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Saves the base model with the adapter folded in, as `save_pretrained` would save one that was never adapted.

    Args:
        peft_model (`PeftModel`): see [`merged_state_dict`]; not changed.
        folder (`str` or `Path`): loads with stock `from_pretrained` afterwards.
        state (`dict[str, Tensor]`, *optional*): of it with the adapter folded in, where processes share the model and have gathered that before.

    Raises:
        ValueError: see [`merged_state_dict`]; before anything is written.
    """
    base, state = (unquantised(peft_model.get_base_model()), state) if state else merged_state_dict(peft_model)
    base.save_pretrained(folder, state_dict=state)


def _check_layer(name: str, layer: Any) -> None:
    from peft.tuners.lora import layer as lora

    # Exact types: other layers for quantised bases derive from these or from LoraLayer, and add deltas in another way.
    known = type(layer) in (lora.Linear, lora.Embedding, lora.Conv1d, lora.Conv2d, lora.Conv3d)
    if not known and not (type(layer).__module__ == "peft.tuners.lora.bnb" and is_quantised(layer.get_base_layer())):
        raise _cannot_fold(f"{type(layer).__module__}.{type(layer).__name__} at {name!r}")
    for adapter in layer.merged_adapters or _active(layer):
        if adapter in layer.lora_variant:
            raise _cannot_fold(f"{type(layer.lora_variant[adapter]).__name__} at {name!r}")
        if layer.lora_bias[adapter]:
            raise _cannot_fold(f"lora_bias at {name!r}")
        if getattr(layer.get_base_layer(), "groups", 1) > 1:
            raise _cannot_fold(f"a grouped convolution at {name!r}")


def _check_ties(base: nn.Module) -> None:
    """Refuse an adapter that changes one of two names of a tensor: untrained the two still agree, and once trained no more."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    wrappers = {name: m for name, m in base.named_modules() if isinstance(m, (LoraLayer, ModulesToSaveWrapper))}
    tied: dict[int, list[tuple[str, frozenset[int]]]] = {}
    for key, tensor in base.state_dict(keep_vars=True).items():
        name, is_original, _ = _without_wrappers(key, wrappers)
        if is_original and isinstance(tensor, torch.Tensor):
            tied.setdefault(id(tensor), []).append((name, _changed_by(key, wrappers)))
    for (first, changed), *others in tied.values():
        for other, also in others:
            if also != changed:
                raise _tie_broken(other, first)


def _changed_by(key: str, wrappers: dict[str, nn.Module]) -> frozenset[int]:
    """Ids of the parameters that an active adapter puts onto, or in place of, a tensor of the base model."""
    parts = key.split(".")
    owner = next((name for end in range(len(parts), -1, -1) if (name := ".".join(parts[:end])) in wrappers), None)
    if owner is None:
        return frozenset()
    wrapper, rest = wrappers[owner], key.removeprefix(f"{owner}.")
    if hasattr(wrapper, "modules_to_save"):
        names = [f"modules_to_save.{name}.{rest.removeprefix('original_module.')}" for name in wrapper.active_adapters]
        return frozenset(id(p) for name, p in wrapper.named_parameters() if name in names)
    if rest != "base_layer.weight":
        return frozenset()
    return frozenset(
        id(p) for name, p in wrapper.named_parameters()
        if not name.startswith("base_layer.") and set(name.split(".")) & set(wrapper.active_adapters)
    )  # fmt: skip


def _active(layer: Any) -> list[str]:
    """Adapters to add: none where they are merged, since the base weight holds them already."""
    return [] if layer.merged else [adapter for adapter in layer.active_adapters if adapter in layer.r]


def _whole_weight(layer: nn.Module) -> torch.Tensor:
    """W, also where it is quantised."""
    if not is_quantised(layer):
        return layer.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def _fold(layer: Any) -> torch.Tensor:
    weight = _whole_weight(layer.get_base_layer())
    for adapter in _active(layer):
        weight = (weight + layer.get_delta_weight(adapter)).to(weight.dtype)
    return weight


def _without_wrappers(key: str, wrappers: dict[str, nn.Module]) -> tuple[str, bool, bool]:
    """Name of a tensor in the base model, and whether it belongs to the base model, and to the adapted one.

    Decided by the modules on the way, not by the text: a model may have a `base_layer` of its own.
    """
    from peft.utils.other import ModulesToSaveWrapper

    parts = key.split(".")
    kept: list[str] = []
    is_original = is_active = True
    position = 0
    while position < len(parts):
        wrapper = wrappers.get(".".join(parts[:position]))
        if wrapper is None:
            kept.append(parts[position])
            position += 1
        elif not isinstance(wrapper, ModulesToSaveWrapper):
            if parts[position] != "base_layer":
                return key, False, False
            position += 1
        else:
            chosen = wrapper.active_adapters[0] if wrapper.active_adapters else None
            if parts[position] == "original_module":
                is_active = is_active and chosen is None
                position += 1
            else:  # modules_to_save.<adapter>
                is_original, is_active = False, is_active and parts[position + 1] == chosen
                position += 2
    return ".".join(kept), is_original, is_active


def _tie_broken(other: str, first: str) -> ValueError:
    return _cannot_fold(f"a change of {other!r} away from {first!r}, which the base model ties to it,")


def _cannot_fold(what: str) -> ValueError:
    return ValueError(
        f"merge_adapter=True: {what} cannot be folded into the weights; set merge_adapter=False to save the adapter apart"
    )
