"""What every trainer and every recipe refuses: values out of range, folders that would be written over, processes that do not
know of each other.
"""

from __future__ import annotations

import logging
import math
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints


if TYPE_CHECKING:
    from torch import Tensor


logger = logging.getLogger(__name__)

SHOWN = 100  # characters of a value in an error
# Keys that recipes had before, words that settings had, and what they are called now.
RENAMED = {
    "replay_samples": "own_samples",
    "replay_filter": "marker",
    "guard_samples": "guard_examples",
    "sample_batch_size": "batch_size",
    "forget_classes": "classes",
    "undesired_classes": "classes",
    "negatives": "undesired_folder",
    "positives": "clean_folder",
    "fisher_weight": "stability_weight",  # of vdu, with stability: fisher
    "npo_beta": "preference_beta",
    "mean": "example",  # of loss_reduction
}
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, SHOWN, SHOWN, SHOWN


def check_fields(config: Any, ranges: Mapping[str, Iterable[str]]) -> None:
    """Refuse fields of another type than they are declared with, words that a `Literal` does not have, and numbers that are not
    finite or out of range. Only the fields that this package declares are looked at; None passes where it is allowed.

    Args:
        config (dataclass): settings of a trainer, or a recipe's.
        ranges (`dict[str, Iterable[str]]`): a rule, `"> 0"`, `"≥ 1"` or an interval as in `"in [0, 1)"`, and the fields it holds for.

    Raises:
        ValueError: naming the field, its value and what it must be.
    """
    own, hints = _declared(type(config))
    for field in fields(config):
        if field.name in own:
            _check_type(field.name, getattr(config, field.name), hints[field.name])
    for rule, names in ranges.items():
        for name in names:
            value = getattr(config, name)
            check_number(name, value, rule)
            if isinstance(value, float) and not value.is_integer() and _kinds(hints[name]) == {int}:
                raise ValueError(f"{name}={value}: must be a whole number")


@cache
def _declared(kind: type) -> tuple[set[str], dict[str, Any]]:
    """The fields that this package declares, and the types of all."""
    own = {
        name
        for base in kind.__mro__
        if base.__module__.startswith("hf_unlearn.")
        for name in base.__dict__.get("__annotations__", ())
    }
    return own, get_type_hints(kind)


def _kinds(hint: Any) -> set[Any]:
    """`{int}` for `int | None`."""
    return {
        kind
        for kind in (get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,))
        if kind is not NoneType
    }


def _check_type(name: str, value: Any, hint: Any) -> None:
    kinds = _kinds(hint)
    if value is None and NoneType in get_args(hint):
        return
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if words:
        if value not in words:
            now = now_called(value, words)
            raise ValueError(f"{name}={shown(value)}: must be one of {', '.join(words)}{now and f'; {now}'}")
        return
    if bool in kinds:
        if not isinstance(value, bool):
            raise ValueError(f"{name}={shown(value)}: must be True or False")
    elif (float in kinds or int in kinds) and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise ValueError(f"{name}={shown(value)}: must be a number")


def now_called(word: Any, known: Iterable[str]) -> str:
    """What to say of a key or a word of a setting that had another name before; nothing of any other.

    Args:
        known: what may be said now.
    """
    now = RENAMED.get(word) if isinstance(word, str) else None
    return f"it is called {now!r} now" if now in known else ""


def check_number(name: str, value: float | None, rule: str) -> None:
    """Refuse a number that is not finite or does not keep a rule of [`check_fields`]; None passes.

    Raises:
        ValueError: naming it, its value and what it must be.
    """
    if value is not None and (math.isinf(value) or not within(value, rule)):
        raise ValueError(f"{name}={value}: must be {'finite' if math.isinf(value) else rule}")


def shown(value: Any) -> str:
    """A value as an error shows it: as Python writes it, and no longer than 100 characters whatever is in it."""
    text = _SHORT.repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def within(value: float, rule: str) -> bool:
    """Whether a number keeps a rule of [`check_fields`]."""
    if rule.startswith("in "):
        low, high = (float(bound) for bound in rule[4:-1].split(","))
        above = value >= low if rule[3] == "[" else value > low
        return above and (value <= high if rule[-1] == "]" else value < high)
    sign, bound = rule.split()
    return value > float(bound) if sign == ">" else value >= float(bound)


# What turns whole weights into 16 bits, or spreads them over machines: of every trainer here.
REFUSED = {
    "bf16_full_eval": "turns the weights themselves into 16 bits, where small steps are lost; use bf16=True",
    "fp16_full_eval": "turns the weights themselves into 16 bits, where small steps are lost; use fp16=True",
    "deepspeed": "DeepSpeed shards parameters and steps out of sight; use DDP",
    "fsdp": "is settled by accelerate's own config: accelerate launch --config_file …; leave it out",
    "parallelism_config": "shards parameters or sequences, which are needed whole; use DDP",
}
# What numbers of the stock config must be, as far as it does not look itself before training has begun.
SEEDS = f"in [0, {2**32})"
STOCK_RANGES = {
    SEEDS: ("seed", "data_seed"),
    "≥ 1": (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "max_length",
    ),
    "> 0": ("num_train_epochs",),
    "≥ 0": (
        "learning_rate",
        "weight_decay",
        "max_grad_norm",
        "adam_epsilon",
        "warmup_steps",
        "dataloader_num_workers",
    ),
    "in [0, 1)": ("adam_beta1", "adam_beta2"),
}
# Of a generator of images, which has no tokens and no embeddings.
REFUSED_OF_IMAGES = {
    "label_smoothing_factor": "there are no labels; leave it out",
    "neftune_noise_alpha": "there are no token embeddings to add noise to; leave it out",
    "include_num_input_tokens_seen": "images are no tokens; leave it out",
    "use_liger_kernel": "there are no such kernels for these networks; leave it out",
}


def check_stock(config: Any, refused: Mapping[str, str]) -> None:
    """Refuse what would be ignored or lead astray of the fields of `TrainingArguments`; called before they are changed by its own
    checks. Numbers and switches that are strings, as a YAML file has them (`1e-4`), are named.

    Args:
        config (`TrainingArguments`): with the values that it was made with.
        refused (`dict[str, str]`): fields that must keep their default, or be off, and why.

    Raises:
        ValueError: naming the field, its value and what it must be.
    """
    import torch

    hints = _declared(type(config))[1]
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if name in refused and value and value != field.default:
            given = f"={shown(value)}" if isinstance(value, str | int | float) else ""
            raise ValueError(f"{name}{given}: {refused[name]}")
        if isinstance(value, str):
            words = field.metadata.get("choices")
            if words and value not in words:
                raise ValueError(f"{name}={shown(value)}: must be one of {', '.join(words)}")
            kinds = _kinds(hints[name])
            if kinds and kinds <= {int, float}:
                raise ValueError(f"{name}={shown(value)}: must be a number")
            if kinds == {bool}:
                raise ValueError(f"{name}={shown(value)}: must be True or False")
    for rule, names in STOCK_RANGES.items():
        for name in names:
            value = getattr(config, name, None)
            if isinstance(value, int | float):
                check_number(name, value, rule)
    if getattr(config, "activation_offloading", False) and not torch.accelerator.is_available():
        raise ValueError("activation_offloading=True: needs a GPU to bring activations back to; set it to False")
    if config.output_dir is not None and not str(config.output_dir).strip():
        raise ValueError(f"output_dir={config.output_dir!r}: is empty; name a folder")
    try:
        os.fspath(config.output_dir or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"output_dir: {str(config.output_dir)!r} is no UTF-8, which weights need; choose another name"
        ) from error
    if "\0" in str(config.output_dir):
        raise ValueError(f"output_dir: {str(config.output_dir)!r} has a NUL in it; choose another name")


def check_features(trainer) -> None:
    """Refuse features of the stock trainer that this model does not have: they would fail, or be ignored, once training has begun.

    Raises:
        ValueError: naming the field.
    """
    from transformers.utils import is_liger_kernel_available

    args, model = trainer.args, trainer.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = type(base).__name__
    if args.activation_checkpointing:
        if not _can_checkpoint(base):
            raise ValueError(
                f"activation_checkpointing=True: {kind} has none; set it (or gradient_checkpointing) to False"
            )
        if getattr(getattr(model, "active_peft_config", None), "peft_type", None) == "PREFIX_TUNING":
            raise ValueError(
                "activation_checkpointing=True: drops the cache that holds a prefix; set it (or gradient_checkpointing) to False"
            )
    if args.neftune_noise_alpha is not None:
        embeddings = None
        with suppress(AttributeError, NotImplementedError):
            embeddings = base.get_input_embeddings()
        if embeddings is None:
            raise ValueError(f"neftune_noise_alpha: {kind} has no token embeddings to add noise to; leave it out")
    if args.use_liger_kernel:
        if not (hasattr(base, "can_generate") and base.can_generate()):
            raise ValueError(f"use_liger_kernel=True: {kind} has no such kernels; leave it out")
        if not is_liger_kernel_available():
            raise ValueError("use_liger_kernel=True: liger-kernel is not installed; install it, or leave it out")


def check_drop_last(trainer) -> None:
    """Refuse to train on nothing.

    Raises:
        ValueError: `dataloader_drop_last` where there are fewer examples than in a batch.
    """
    args, rows, size = trainer.args, trainer.train_dataset, trainer._train_batch_size * trainer.args.world_size
    if args.dataloader_drop_last and rows is not None and len(rows) < size:
        raise ValueError(
            f"dataloader_drop_last=True: leaves none of {len(rows)} examples in batches of {size}; set it to False"
        )


def _can_checkpoint(model: Any) -> bool:
    """Of Transformers or diffusers, or with methods of its own."""
    for name in ("supports_gradient_checkpointing", "_supports_gradient_checkpointing"):
        if hasattr(type(model), name):
            return getattr(model, name)
    return hasattr(model, "activation_checkpointing_enable") or hasattr(model, "gradient_checkpointing_enable")


def check_processes(args) -> None:
    """Refuse, before a model is loaded, processes that were launched together as they cannot train: that do not know of each other, so that each
    would write the same folder; or by a config of accelerate that no trainer here takes.

    Raises:
        ValueError: as when `accelerate launch` starts several on a machine without a GPU, which it does not tell them; DeepSpeed; settings of FSDP, see
            [`check_settings_of_fsdp`].
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != args.world_size:
        raise ValueError(f"use_cpu: {launched} processes were launched, but there is no GPU; set use_cpu=True")
    if _launched_by("DEEPSPEED"):
        raise ValueError(
            "DeepSpeed is not supported: it steps inside backward, out of sight; use FSDP2 (recipes/accelerate/fsdp2.yaml), or DDP"
        )
    if _launched_by("FSDP"):
        from accelerate import FullyShardedDataParallelPlugin

        check_settings_of_fsdp(FullyShardedDataParallelPlugin(), args)


def _launched_by(kind: str) -> bool:
    """What `accelerate launch` tells of its config."""
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"


def check_parallelism(trainer, why: str, shares: bool = False) -> None:
    """Refuse what hides whole parameters or gradients from a trainer.

    Args:
        why (`str`): what it would do, as in `"they step or shard out of the anchor's sight"`.
        shares (`bool`, defaults to `False`): the trainer knows parameters that processes share among them, of FSDP2.

    Raises:
        ValueError: several GPUs in one process, DeepSpeed, FSDP 1, FSDP2 where the trainer does not share, or a setting of it that hides what
            is needed.
    """
    if trainer.args.n_gpu > 1:
        raise ValueError("several GPUs in one process (nn.DataParallel) are not supported; use `accelerate launch`")
    other = "FSDP2 (recipes/accelerate/fsdp2.yaml)" if shares else "DDP"
    if trainer.is_deepspeed_enabled:
        raise ValueError(f"DeepSpeed is not supported: {why}; use {other}")
    if not trainer.is_fsdp_enabled:
        if _launched_by("FSDP") and trainer.args.process_index == 0:  # of accelerate 1.15, without a word
            logger.warning(
                "FSDP: is for accelerators; on the CPU accelerate takes DDP, and each process has the whole model"
            )
        return
    if not shares:
        raise ValueError(f"FSDP is not supported: {why}; use DDP")
    check_settings_of_fsdp(trainer.accelerator.state.fsdp_plugin, trainer.args)


def check_settings_of_fsdp(plugin, args) -> None:
    """Refuse what of FSDP hides whole parameters, or was never tried with an original beside.

    Args:
        plugin (`accelerate.FullyShardedDataParallelPlugin`): as accelerate's config has it.
        args (`TrainingArguments`): of the trainer.

    Raises:
        ValueError: FSDP 1, or a setting of FSDP2, by its name in the config.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy

    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version={plugin.fsdp_version}: flattens parameters; set it to 2")
    wrong = {
        "auto_find_batch_size": (getattr(args, "auto_find_batch_size", False), "would share the model a second time; set per_device_train_batch_size"),
        "fsdp_state_dict_type": ("FULL" not in str(plugin.state_dict_type), "no model would be saved at the end; set FULL_STATE_DICT"),
        "fsdp_cpu_ram_efficient_loading": (plugin.cpu_ram_efficient_loading, "each process looks at the original before it is shared; set false"),
        "fsdp_activation_checkpointing": (plugin.activation_checkpointing, "renames parameters; set activation_checkpointing=True of the arguments instead"),
        "fsdp_offload_params": (isinstance(plugin.cpu_offload, CPUOffloadPolicy), "was never tried with an original beside; set false"),
    }  # fmt: skip
    for name, (is_wrong, what) in wrong.items():
        if is_wrong:
            raise ValueError(f"{name}: {what}")


def check_shared_once(model: Any) -> None:
    """Refuse to train a model again that processes share, where accelerate 1.15 would mix up its parameters: it knows them by the place in memory of this
    process's part, of which those have none that have fewer rows than there are processes.

    Raises:
        ValueError: there are two such parameters or more.
    """
    from ..parameters.sharding import without_a_part

    if len(names := without_a_part(model)) > 1:
        raise ValueError(
            f"model: was trained, and processes share it since; a second training would take {names[0]!r} for {names[1]!r}, as some have no part of "
            "either; load what was saved in a new process"
        )


def check_single_precision(parameters: Iterable[Tensor], what: str = "model: its weights", other: str = "") -> None:
    """Refuse to train weights in 16 bits: a step of 1e-5 is less than half of their last digit, and so is lost.

    Args:
        parameters (`Iterable[Tensor]`): those that are to be trained; frozen ones may be in any precision.
        what (`str`): what to call them in an error.
        other (`str`, *optional*): another way out, as in `", or train a LoRA"`.

    Raises:
        ValueError: one is fp16, bf16 or fp8.
    """
    kinds = {p.dtype for p in parameters if p.dtype.is_floating_point and p.dtype.itemsize < 4}
    if kinds:
        raise ValueError(
            f"{what} are {min(map(str, kinds))}, in which small steps are lost; load it in float32 (and set bf16=True to "
            f"compute in 16 bits){other}"
        )


def check_in_memory(model) -> None:
    """Refuse a model of which accelerate brings weights only when they are used.

    Raises:
        ValueError: some are elsewhere.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "model: some of its weights are not in memory (device_map, or offloading); load it whole, a language model in 4 bits if need be"
        )


def check_model_precision(model, args) -> None:
    """[`check_single_precision`] of what is to be trained of a model of Transformers or PEFT, unless `model_init_kwargs` asks for a
    dtype.

    Raises:
        ValueError: trainable weights in 16 bits.
    """
    asked_for = {"dtype", "torch_dtype"} & set(getattr(args, "model_init_kwargs", None) or ())
    if asked_for or getattr(model, "is_quantized", False):  # the adapter of a quantized model is bf16 in TRL 1.16
        return
    way_out = "" if hasattr(model, "peft_config") else ", or train a LoRA (peft_config=)"
    check_single_precision([p for p in model.parameters() if p.requires_grad], other=way_out)


def check_hub_strategy(args) -> None:
    """Refuse pushes before the end of a run.

    Raises:
        ValueError: another `hub_strategy` than `"end"`.
    """
    strategy = getattr(args.hub_strategy, "value", args.hub_strategy)
    if args.push_to_hub and str(strategy) != "end":
        raise ValueError(f"hub_strategy={strategy!r}: uploads half-finished weights; use hub_strategy='end'")


def check_is_not_original(output_dir: str | Path, original: str | Path | None) -> None:
    """Refuse to write over the model that is to be changed.

    Args:
        original: the name it was loaded by, or None if it is not known; an id on the Hub is no folder.

    Raises:
        ValueError: they are one folder, however it is written; or one lies in the other where it would be written over: within the
            original or its pipeline, or where it is the checkpoint of a run or a part of a pipeline.
    """
    if not original or not Path(original).is_dir():
        return
    folder, output = Path(original).resolve(), Path(output_dir).resolve()
    # A denoiser lies in the folder of its pipeline.
    whole = folder.parent if (folder.parent / "model_index.json").is_file() else folder
    is_part = re.fullmatch(r"checkpoint-\d+|unet|transformer|generator|discriminator", folder.name)
    if output in (whole, folder) or whole in output.parents or (is_part and output == folder.parent):
        raise ValueError(f"output_dir: {str(output_dir)!r} holds the original model; choose another folder")
