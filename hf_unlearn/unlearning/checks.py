"""What an unlearning trainer is given, checked before anything is written."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data import LABEL_COLUMNS, label_column, labels_of, overlap
from ..hub.adapters import check_mergeable
from ..training.checks import check_model_precision, check_processes


def check_arguments(
    name: str,
    args,
    *,
    train_dataset=None,
    forget_dataset=None,
    retain_dataset=None,
    heldout_dataset=None,
    eval_dataset=None,
    data_collator=None,
) -> None:
    """Refuse what cannot work, in one line, before anything is loaded or written.

    Raises:
        ValueError: naming the argument and the fix.
    """
    check_processes(args)
    if train_dataset is not None:
        raise ValueError(
            f"train_dataset: {name} learns to forget; pass forget_dataset= (and retain_dataset=, if you have one)"
        )
    if data_collator is not None and not callable(data_collator):
        kind = type(data_collator).__name__
        raise ValueError(f"data_collator: {kind} makes no batches; pass a callable, and examples as forget_dataset=")
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
        if argument == "forget_dataset" or forget_dataset is None:
            continue
        if shared := overlap(forget_dataset, dataset, args.id_column):
            raise ValueError(f"{argument}: {shared}; remove them from one of the two")
    evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    for part, dataset in evaluated.items():
        if hasattr(dataset, "__len__") and len(dataset) == 0:
            argument = f"eval_dataset[{part!r}]" if part else "eval_dataset"
            raise ValueError(f"{argument}: is empty, so there is nothing to evaluate; pass rows, or leave it out")
        if (
            part == "retain"
            and forget_dataset is not None
            and (shared := overlap(forget_dataset, dataset, args.id_column))
        ):  # utility is judged by them
            raise ValueError(f"eval_dataset['retain']: {shared}; remove them from it")
    if args.load_best_model_at_end and args.guard:
        raise ValueError("load_best_model_at_end: the guard restores the best state; leave it out, or set guard=False")
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


def check_stock_arguments(args, model, model_init=None, **given: Any) -> None:
    """Refuse arguments of the stock trainers that would be ignored.

    Raises:
        ValueError: naming the argument and the fix.
    """
    if model_init is None and model is None:
        raise ValueError("model: missing; pass a model, a path or an id")
    if model_init is not None and model is not None:
        raise ValueError("model_init: given beside model; keep one of them")
    if model_init is not None and hasattr(args, "packing"):
        raise ValueError("model_init: SFTTrainer takes none; pass a model, and make a new trainer for each trial")
    if model_init is not None and any(given.get("optimizers") or ()):
        raise ValueError("optimizers: would hold the parameters of another model than model_init makes; leave it out")
    if given.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func: would be ignored while unlearning; override task_loss in a subclass")
    if given.get("quantization_config") is not None:
        raise ValueError(
            "quantization_config: would be ignored; put it into model_init_kwargs, or load the model with it"
        )


def first_rows(eval_dataset: Any) -> Any:
    """A row of what is evaluated, from which a trainer that only evaluates sees how its examples look; None if there is none."""
    rows = next(iter(eval_dataset.values()), None) if isinstance(eval_dataset, dict) else eval_dataset
    return rows.select(range(1)) if hasattr(rows, "select") and hasattr(rows, "__len__") else rows


def check_trainable(model: nn.Module, args) -> None:
    """Refuse a model that training would not change, or not as it should, and what cannot be done with an adapter.

    Raises:
        ValueError: naming the argument and the fix.
    """
    has_adapter = hasattr(model, "peft_config")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        fix = "load the adapter with is_trainable=True" if has_adapter else "unfreeze some with requires_grad_(True)"
        raise ValueError(f"model: none of its parameters is trainable; {fix}")
    check_model_precision(model, args)
    if has_adapter and args.bn == "train" and any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise ValueError("bn='train': an adapter's checkpoints hold no BatchNorm statistics; set bn='frozen'")
    if has_adapter and args.merge_adapter and hasattr(model, "get_base_model"):  # diffusers' own fuse themselves
        check_mergeable(model)  # now, not when it is to be saved
    if has_adapter:
        check_anchors(args)


def check_anchors(args) -> None:
    """Refuse an anchor on the factors of a LoRA, which only their product has a meaning of.

    Raises:
        ValueError: naming the weight.
    """
    for name in args.anchors_on_parameters:
        if getattr(args, name):
            raise ValueError(f"{name}: an anchor on LoRA factors means nothing; set it to 0 and use isotropic_weight")


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
            if len(dataset) and not isinstance(dataset[0], dict):
                kind = type(dataset[0]).__name__
                raise ValueError(
                    f"{argument}: its rows are of type {kind}; pass a datasets.Dataset, or rows that are dicts"
                )
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
    both = classes.get("forget_dataset", set()) & classes.get("retain_dataset", set())
    if args.forget == "class" and both:
        raise ValueError(
            f"retain_dataset: holds class {min(both)}, which is to be forgotten; remove it, or forget='examples'"
        )
    return sorted(classes.get("forget_dataset", ()))
