"""What a trainer is given: checked before anything is written, loaded where it is an id, completed where it is raw."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.utils.generic import find_labels

from ..data import LABEL_COLUMNS, RawCollator, label_column, labels_of, overlap
from ..hub.adapters import check_mergeable


CLASSIFIERS = tuple(f"For{what}Classification" for what in ("Sequence", "Image", "Video", "Audio"))


def check_processes(args) -> None:
    """Refuse processes that were launched together and do not know of each other: each would write the same folder.

    Raises:
        ValueError: as when `accelerate launch` starts several on a machine without a GPU, which it does not tell them.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != args.world_size:
        raise ValueError(f"use_cpu: {launched} processes were launched, but there is no GPU; set use_cpu=True")


def check_arguments(name: str, args, *, train_dataset, forget_dataset, retain_dataset, heldout_dataset) -> None:
    """Refuse what cannot work, in one line, before anything is loaded or written.

    Raises:
        ValueError: naming the argument and the fix.
    """
    check_processes(args)
    if train_dataset is not None:
        raise ValueError(
            f"train_dataset: {name} learns to forget; pass forget_dataset= (and retain_dataset=, if you have one)"
        )
    if forget_dataset is None:
        raise ValueError("forget_dataset: missing; pass the examples to forget")
    datasets = {"forget_dataset": forget_dataset, "retain_dataset": retain_dataset, "heldout_dataset": heldout_dataset}
    for argument, dataset in datasets.items():
        if dataset is None:
            continue
        if isinstance(dataset, dict):
            raise ValueError(f"{argument}: has splits {', '.join(dataset)}; pass one of them")
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ValueError(
                f"{argument}: a streaming dataset has no length and is passed over once; make it a Dataset first"
            )
        if len(dataset) == 0:
            use = argument.removesuffix("_dataset").replace("heldout", "compare with")
            raise ValueError(f"{argument}: is empty, so there is nothing to {use}; pass rows")
        if argument != "forget_dataset" and (shared := overlap(forget_dataset, dataset, args.id_column)):
            raise ValueError(
                f"{argument}: {len(shared)} of its ids are in forget_dataset too (first: {shared[0]!r} in column "
                f"{args.id_column!r}); remove them from one of the two"
            )
    if args.load_best_model_at_end:
        raise ValueError("load_best_model_at_end: the guard restores the best state; leave it out")
    if retain_dataset is not None and args.dataloader_persistent_workers:
        raise ValueError(
            "dataloader_persistent_workers: would pair forget and retain examples once for all; set it to False"
        )
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output_dir):
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir: cannot write to {args.output_dir!r} ({error.strerror}); choose another folder"
        ) from error


def load_model(model: str | nn.Module, args, processing_class: Any) -> tuple[nn.Module, Any, str | None]:
    """`(model, processing_class, name)`: an id or a path is loaded with the class its config names, and with its processor.

    In fp32, as TRL does and whatever it was saved in: steps of 1e-5 are lost in 16 bits. `model_init_kwargs` says otherwise.

    Raises:
        ValueError: the model has no head and so no loss, or its config names no class of Transformers.
    """
    if isinstance(model, str):
        import transformers

        name = model
        config = transformers.AutoConfig.from_pretrained(name)
        architecture = getattr(transformers, (config.architectures or ["?"])[0], None)
        if architecture is None:
            raise ValueError(
                f"model={name!r}: its config names no class of Transformers; load it yourself and pass the model"
            )
        model = architecture.from_pretrained(
            name, **({"dtype": torch.float32} | (getattr(args, "model_init_kwargs", None) or {}))
        )
        if processing_class is None:
            processing_class = _load_processor(name, text_first=is_causal_lm(model))
    else:
        name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if type(base).__name__ in MODEL_MAPPING_NAMES.values() or not find_labels(type(base)):
        raise ValueError(
            f"model: {type(base).__name__} takes no labels, so it has no loss; load it with an AutoModelFor… class"
        )
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


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the prediction at a token is of the next one. Transformers 5.23 knows it of some classes only: GPT-2 has no
    `loss_type`, so its Trainer's own `_loss_shifts_labels` is wrong.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return hasattr(base, "can_generate") and base.can_generate()


def check_trainable(model: nn.Module, args) -> None:
    """Refuse a model that training would not change, and what cannot be done with an adapter.

    Raises:
        ValueError: naming the argument and the fix.
    """
    has_adapter = hasattr(model, "peft_config")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        fix = "load the adapter with is_trainable=True" if has_adapter else "unfreeze some with requires_grad_(True)"
        raise ValueError(f"model: none of its parameters is trainable; {fix}")
    if has_adapter and args.bn == "train" and any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise ValueError("bn='train': an adapter's checkpoints hold no BatchNorm statistics; set bn='frozen'")
    if has_adapter and args.merge_adapter:
        check_mergeable(model)  # now, not when it is to be saved
    if has_adapter and args.fisher_weight:
        raise ValueError("fisher_weight: a Fisher anchor on LoRA factors means nothing; set fisher_weight=0")


def _load_processor(name: str, text_first: bool):
    from transformers import AutoImageProcessor, AutoTokenizer

    for auto in (AutoTokenizer, AutoImageProcessor) if text_first else (AutoImageProcessor, AutoTokenizer):
        try:
            return auto.from_pretrained(name)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def raw_collator(dataset: Any, processing_class: Any) -> RawCollator | None:
    """A collator for rows of raw images or texts; None where the rows are model inputs already.

    Raises:
        ValueError: raw rows, and nothing to process them with.
    """
    columns = (
        dataset[0].keys() if isinstance(dataset[0], dict) else ()
    )  # as a transform leaves them, unlike column_names
    if any(column in columns for column in ("pixel_values", "input_ids")):
        return None
    column = next((column for column in ("image", "text") if column in columns), None)
    if column is None:
        return None
    if processing_class is None:
        kind = "image processor" if column == "image" else "tokenizer"
        raise ValueError(f"processing_class: forget_dataset holds raw {column}s; pass the model's {kind}")
    limit = processing_class.model_max_length if isinstance(processing_class, PreTrainedTokenizerBase) else None
    return RawCollator(processing_class, column, max_length=limit if limit and limit < 10**9 else None)


def check_labels(args, num_labels: int, **datasets: Any) -> list[int]:
    """The classes that occur in `forget_dataset`, sorted.

    Raises:
        ValueError: a dataset without labels, a label that the model does not have, or rows to keep of a class to forget.
    """
    classes: dict[str, set[int]] = {}
    for argument, dataset in datasets.items():
        if dataset is None:
            continue
        if label_column(dataset) is None:
            raise ValueError(
                f"{argument}: has no label column; name it one of {', '.join(LABEL_COLUMNS)} (rename_column)"
            )
        labels = labels_of(dataset)
        if odd := [label for label in labels if not isinstance(label, int)]:
            raise ValueError(
                f"{argument}: label {odd[0]!r} is no class index; give every row one integer (class_encode_column)"
            )
        classes[argument] = set(labels)
        outside = sorted(label for label in classes[argument] if not 0 <= label < num_labels)
        if outside:
            raise ValueError(
                f"{argument}: label {outside[0]} is outside the model's num_labels={num_labels} (0…{num_labels - 1})"
            )
    both = classes["forget_dataset"] & classes.get("retain_dataset", set())
    if args.forget == "class" and both:
        raise ValueError(
            f"retain_dataset: holds class {min(both)}, which is to be forgotten; remove it, or forget='examples'"
        )
    return sorted(classes["forget_dataset"])
