"""What a model is trained to do: its class, its processor, and its loss on each example."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.utils.generic import find_labels

from ..files import loading
from ..hub.adapters import is_quantised
from .checks import check_in_memory


CLASSES = "single_label_classification"
CLASSIFIERS = tuple(f"For{what}Classification" for what in ("Sequence", "Image", "Video", "Audio"))


def load_model(
    model: str | os.PathLike | nn.Module, args, processing_class: Any, *, any_head: bool = False
) -> tuple[nn.Module, Any, str | None]:
    """`(model, processing_class, name)`: an id or a path is loaded with the class its config names, and with its processor.

    In fp32, as TRL does and whatever it was saved in: steps of 1e-5 are lost in 16 bits. `model_init_kwargs` says otherwise. With `any_head` whatever
    takes labels will do, and not single-label classifiers and causal language models alone.

    Raises:
        ValueError: nothing can be loaded by that name, the model has no head and so no loss, or its config names no class of Transformers.
    """
    if isinstance(model, str | os.PathLike):
        import transformers

        if getattr(args, "trust_remote_code", False):
            raise ValueError("trust_remote_code=True: load a model of foreign code yourself, and pass the model")
        name = model = os.fspath(model)
        with loading("model", name, "a model"):
            config = transformers.AutoConfig.from_pretrained(name)
        architecture = getattr(transformers, (config.architectures or ["?"])[0], None)
        if architecture is None:
            raise ValueError(
                f"model={name!r}: its config names no class of Transformers; load it yourself and pass the model"
            )
        with loading("model", name, "a model"):
            model = architecture.from_pretrained(
                name, **({"dtype": torch.float32} | (getattr(args, "model_init_kwargs", None) or {}))
            )
        if processing_class is None:
            processing_class = _load_processor(name, text_first=is_causal_lm(model))
    elif not isinstance(model, nn.Module):
        raise ValueError(f"model: {type(model).__name__} is no model; pass a model, a path or an id")
    else:
        name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    check_in_memory(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if type(base).__name__ in MODEL_MAPPING_NAMES.values() or not find_labels(type(base)):
        raise ValueError(
            f"model: {type(base).__name__} takes no labels, so it has no loss; {_with_labels(type(base))}"
        )
    if any_head:
        return model, processing_class, name
    config = getattr(base, "config", None)
    other_head = isinstance(base, PreTrainedModel) and base.loss_type not in CLASSIFIERS and not is_causal_lm(base)
    if getattr(config, "is_encoder_decoder", False) or other_head:
        raise ValueError(
            f"model: {type(base).__name__} is not supported; single-label classifiers and causal language models are"
        )
    problem = getattr(config, "problem_type", None)
    if problem in ("regression", "multi_label_classification"):
        raise ValueError(
            f"model: problem_type={problem!r} is not supported; single-label classifiers and causal LMs are"
        )
    return model, processing_class, name


def _with_labels(kind: type) -> str:
    """What to do with a model that cannot be trained as it is."""
    if not kind.__name__.partition("For")[1]:
        return "load it with an AutoModelFor… class"
    import transformers

    # DeiT and LeViT answer with the mean of two heads, for inference only; the class with one of them is for training.
    other = getattr(transformers, kind.__name__.removesuffix("WithTeacher"), None)
    if other not in (None, kind) and find_labels(other):
        return f"load it with {other.__name__}"
    return "it is for inference only"


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the prediction at a token is of the next one. Transformers 5.23 knows it of some classes only: GPT-2 has no
    `loss_type`, so its Trainer's own `_loss_shifts_labels` is wrong.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return hasattr(base, "can_generate") and base.can_generate()


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether labels are read as well: the prediction at a token of theirs is of that token."""
    return is_causal_lm(model) and bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def problem_of(model: nn.Module, labels: Tensor) -> str:
    """What a classification head of Transformers takes `labels` for: "regression", "multi_label_classification", or CLASSES, as every other model."""
    config = getattr(model, "config", None)
    problem, number = (getattr(config, name, None) for name in ("problem_type", "num_labels"))
    if is_causal_lm(model) or config is None:
        return CLASSES
    if problem is None and number == 1:
        return "regression"
    if problem is None and labels.is_floating_point():
        return "multi_label_classification"
    return problem or CLASSES


def head_of(model: nn.Module) -> nn.Linear:
    """The last linear layer with a number for each class.

    Raises:
        ValueError: there is none.
    """
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    heads = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and classes in (None, module.out_features)
    ]
    if not heads:
        raise ValueError(f"model: {type(model).__name__} has no linear head with {classes} outputs")
    return heads[-1]


def router_loss_weight(trainer) -> float:
    """What the stock trainer weighs the load-balancing loss of a mixture of experts with, beside the task's; 0 where it has none."""
    if hasattr(trainer, "aux_loss_enabled"):  # TRL's
        return trainer.router_aux_loss_coef if trainer.aux_loss_enabled else 0.0
    config = getattr(trainer.model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "router_aux_loss_coef", 0.0) if getattr(config, "output_router_logits", False) else 0.0


@contextmanager
def ready_quantised(trainer: Any, model: nn.Module | None) -> Iterator[None]:
    """Around a stock trainer's constructor: makes an adapter on weights that bitsandbytes quantised trainable as others are. In float32, where
    TRL 1.16 makes it bfloat16, in which small steps are lost, and one that the model came with as it was; and with gradients through the
    weights, which bitsandbytes 0.50 on some CPUs packs at the first forward pass in eval mode, and from then on lets none through.

    Args:
        trainer: which has the model as `trainer.model` afterwards.
        model (`nn.Module`, *optional*): what it is given.
    """
    quantised = getattr(model, "is_quantized", False)
    before = [(p, p.data) for p in model.parameters() if p.requires_grad] if quantised else []
    yield
    if not getattr(trainer.model, "is_quantized", False):
        return
    for parameter, data in before:
        if parameter.dtype.itemsize < data.dtype.itemsize:
            parameter.data = data
    for layer in trainer.model.modules():
        if is_quantised(layer):
            layer.state_dict()  # takes them out of the packing
            layer.support_avx512bf16_for_cpu = False
    for parameter in trainer.model.parameters():
        if parameter.requires_grad and parameter.dtype.is_floating_point and parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.float()


def _load_processor(name: str, text_first: bool):
    from transformers import AutoImageProcessor, AutoTokenizer

    for auto in (AutoTokenizer, AutoImageProcessor) if text_first else (AutoImageProcessor, AutoTokenizer):
        try:
            return auto.from_pretrained(name)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


class LoadsByName:
    """Gives a Trainer a resume that loads a checkpoint's weights through `from_pretrained`.

    Transformers 5.23 saves some models (ViT) under the parameter names of older versions, which `from_pretrained` understands and
    Trainer does not: it warns of missing keys and goes on with the weights that it has.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        model = model if model is not None else self.model
        if hasattr(model, "peft_config") or not hasattr(model, "from_pretrained") or self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = type(model).from_pretrained(resume_from_checkpoint, config=model.config, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
