"""What an influence trainer is given: checked before anything runs, and brought into one form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from ..data import value_name
from ..training.checks import (
    check_drop_last,
    check_features,
    check_model_precision,
    check_parallelism,
    check_processes,
)
from ..training.models import router_loss_weight


def check_arguments(args, train_dataset, target_dataset, target, kwargs) -> None:
    check_processes(args)
    if train_dataset is None:
        raise ValueError("train_dataset: missing; pass the examples that are to be judged")
    if not hasattr(train_dataset, "__len__") or not hasattr(train_dataset, "__getitem__"):
        raise ValueError(
            "train_dataset: a streaming dataset has no length and no stable rows; make it a Dataset first"
        )
    if len(train_dataset) == 0:
        raise ValueError("train_dataset: is empty; pass rows")
    if target not in (None, "self"):
        raise ValueError(f"target: {target!r} is not 'self'; pass other targets as target_dataset=")
    if (target is None) == (target_dataset is None):
        raise ValueError("target_dataset: pass it, or target='self', and not both")
    if kwargs.get("compute_loss_func") is not None and hasattr(args, "packing"):
        raise ValueError("compute_loss_func: not supported; the loss must be the mean of the examples' own")
    if kwargs.get("model_init") is not None and hasattr(args, "packing"):
        raise ValueError("model_init: SFTTrainer takes none; pass a model")
    if getattr(args, "packing", False) or getattr(args, "padding_free", False):
        name = "packing" if args.packing else "padding_free"
        raise ValueError(
            f"{name}=True: mixes documents in one row, so their gradients cannot be told apart; set it to False"
        )
    if args.preconditioned and target == "self":
        raise ValueError(
            "preconditioned: folds Adam into the targets' gradients, and target='self' has none; set it to False"
        )
    if args.n_calibration_runs and target == "self":
        raise ValueError(
            "n_calibration_runs: measures the losses of target sets, and target='self' has none; set it to 0"
        )
    if args.n_calibration_runs and hasattr(args, "packing"):
        raise ValueError("n_calibration_runs: SFTTrainer takes no model_init=, so it cannot begin again; set it to 0")
    if args.n_calibration_runs and kwargs.get("model_init") is None:
        raise ValueError("n_calibration_runs: needs model_init= instead of model=, to begin again from other seeds")
    if target == "self" and args.per_device_train_batch_size < 2:
        raise ValueError(
            "per_device_train_batch_size: target='self' compares an example with others; set it to 2 or more"
        )


def check_model(trainer) -> None:
    looks = getattr(trainer.args, "only_looks", False)
    check_parallelism(trainer, "no process would see whole parameters", shares=not looks)
    if trainer.is_fsdp_enabled and trainer.model_init is not None:
        raise ValueError(
            "model_init: is not supported with FSDP2, under which a model is looked at before it is shared; pass model="
        )
    check_features(trainer)
    if not looks:  # no step is lost where none is taken
        check_model_precision(trainer.model, trainer.args)
    check_drop_last(trainer)
    if router_loss_weight(trainer):
        name = "router_aux_loss_coef" if hasattr(trainer.args, "router_aux_loss_coef") else "output_router_logits"
        raise ValueError(f"{name}: the load-balancing loss is of a whole batch, not of its examples; set it to 0")
    if not any(p.requires_grad for p in trainer.model.parameters()):
        raise ValueError("model: none of its parameters is trainable; unfreeze some with requires_grad_(True)")


def sample_ids_of(dataset, column: str) -> list:
    names = getattr(dataset, "column_names", None) or ()
    if column != "id" and column not in names:
        raise ValueError(
            f"id_column: {column!r} is not in the training set (it has {', '.join(names) or 'no named columns'})"
        )
    ids = list(dataset.with_format(None)[column]) if column in names else list(range(len(dataset)))
    if not (all(isinstance(value, int) for value in ids) or all(isinstance(value, str) for value in ids)):
        raise ValueError(f"train_dataset: column {column!r} must hold ids that are all int or all str")
    if len(set(ids)) < len(ids):
        seen: set = set()
        twice = next(value for value in ids if value in seen or seen.add(value))
        raise ValueError(f"train_dataset: id {twice!r} occurs twice in column {column!r}; ids must be unique")
    return ids


def target_sets_of(dataset) -> dict[str, Any]:
    """Target sets by name."""
    sets = dict(dataset) if isinstance(dataset, Mapping) else {"target": dataset}
    if len(sets) == 1 and "target" in (getattr(dataset, "column_names", None) or ()) and isinstance(dataset, Dataset):
        feature = dataset.features["target"]
        values = dataset.with_format(None)["target"][:]
        rows: dict[str, list[int]] = {}
        for row, value in enumerate(values):
            rows.setdefault(value_name(value, feature), []).append(row)
        sets = {name: dataset.select(chosen).remove_columns("target") for name, chosen in rows.items()}
    if not sets:
        raise ValueError("target_dataset: is empty; pass examples that show the behaviour")
    for name, part in sets.items():
        if not hasattr(part, "__len__") or not hasattr(part, "__getitem__"):
            raise ValueError(
                f"target_dataset: {name!r} is a stream, which cannot be looked at again; make it a Dataset"
            )
        if len(part) == 0:
            raise ValueError(f"target_dataset: {name!r} is empty; pass examples that show the behaviour")
    if "self" in sets:
        raise ValueError("target_dataset: a target cannot be called 'self'; rename it")
    return sets
