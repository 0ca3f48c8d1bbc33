"""What every trainer and every recipe refuses: values out of range, folders that would be written over, processes that do not
know of each other.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


SHOWN = 100  # characters of a value in an error
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
    own = {
        name
        for kind in type(config).__mro__
        if kind.__module__.startswith("hf_unlearn.")
        for name in kind.__dict__.get("__annotations__", ())
    }
    hints = get_type_hints(type(config))
    for field in fields(config):
        if field.name in own:
            _check_type(field.name, getattr(config, field.name), hints[field.name])
    for rule, names in ranges.items():
        for name in names:
            value = getattr(config, name)
            check_number(name, value, rule)
            if isinstance(value, float) and not value.is_integer() and _kinds(hints[name]) == {int}:
                raise ValueError(f"{name}={value}: must be a whole number")


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
            raise ValueError(f"{name}={shown(value)}: must be one of {', '.join(words)}")
        return
    if bool in kinds:
        if not isinstance(value, bool):
            raise ValueError(f"{name}={shown(value)}: must be True or False")
    elif (float in kinds or int in kinds) and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise ValueError(f"{name}={shown(value)}: must be a number")


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


def check_processes(args) -> None:
    """Refuse processes that were launched together and do not know of each other: each would write the same folder.

    Raises:
        ValueError: as when `accelerate launch` starts several on a machine without a GPU, which it does not tell them.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != args.world_size:
        raise ValueError(f"use_cpu: {launched} processes were launched, but there is no GPU; set use_cpu=True")


def check_parallelism(trainer, why: str) -> None:
    """Refuse what hides whole parameters or gradients from a trainer.

    Args:
        why (`str`): what it would do, as in `"they step or shard out of the anchor's sight"`.

    Raises:
        ValueError: several GPUs in one process, DeepSpeed or FSDP.
    """
    if trainer.args.n_gpu > 1:
        raise ValueError("several GPUs in one process (nn.DataParallel) are not supported; use `accelerate launch`")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(f"DeepSpeed and FSDP are not supported: {why}; use DDP")


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
        ValueError: they are one folder.
    """
    if not original or not Path(original).is_dir():
        return
    folder = Path(original).resolve()
    # A denoiser lies in the folder of its pipeline.
    whole = [folder, folder.parent] if (folder.parent / "model_index.json").is_file() else [folder]
    if Path(output_dir).resolve() in whole:
        raise ValueError(f"output_dir: {str(output_dir)!r} holds the original model; choose another folder")
