"""What the recipes of several kinds of jobs refuse alike."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...examples.named import NAMES
from ...training.checks import check_fields, shown


def check_needs(job: Any, *needs: tuple[str, str, str]) -> None:
    """Refuse a key that stands without another one.

    Args:
        needs: `(key, the key that it needs, an example of that)`.

    Raises:
        ValueError: naming the key that is missing.
    """
    for name, needed, example in needs:
        if getattr(job, name) and not getattr(job, needed):
            raise ValueError(f"{needed}: missing, which {name} needs; set it to {example}")


def check_at_most_one(job: Any, names: Sequence[str]) -> list[str]:
    """Those of the keys that are given: one, or none.

    Raises:
        ValueError: two that exclude each other.
    """
    given = [name for name in names if getattr(job, name) not in (None, [], "", False)]
    if len(given) > 1:
        raise ValueError(f"{given[1]}: given beside {given[0]}; keep one of them")
    return given


def check_numbers(undesired: Sequence[int] | None, looked_at: int, *, others: str) -> None:
    """Whether the numbers that a recipe calls undesired are on its sheet of `looked_at` samples.

    Args:
        others (`str`): what samples are that are not named, as in `"positive"`.

    Raises:
        ValueError: a number that is not, none at all, or all of them.
    """
    if looked_at < 2:
        raise ValueError(f"looked_at={looked_at}: must be ≥ 2")
    if odd := [number for number in undesired or () if not 0 <= number < looked_at]:
        raise ValueError(
            f"undesired: {odd[0]} is not on the sheet, whose samples are 0 to {looked_at - 1}; correct it, or set "
            "looked_at as it was when the sheet was written"
        )
    if undesired is not None and not undesired:
        raise ValueError("undesired: is empty; name at least one sample, or leave it out to be given the sheet")
    if undesired is not None and len(set(undesired)) == looked_at:
        raise ValueError(f"undesired: names all {looked_at} samples, none is left as {others}; raise looked_at")


def check_folders(given: Mapping[str, Any]) -> None:
    """Refuse a folder to write to that can be none: no name, or a file in its place or above it.

    Args:
        given: keys and values; those that end in `_dir` name folders.

    Raises:
        ValueError: naming the key.
    """
    for name, value in given.items():
        if not name.endswith("_dir") or not isinstance(value, str) or not value:
            continue
        if not value.strip():
            raise ValueError(f"{name}={shown(value)}: is blank; name a folder")
        path = Path(value)
        if file := next((above for above in (path, *path.parents) if above.is_file()), None):
            raise ValueError(f"{name}: {shown(str(file))} is a file; name a folder")


def check_small(job: Any, name: str, takes: Sequence[str]) -> None:
    """Refuse the name of a small model of another kind; a folder of that name passes.

    Args:
        name (`str`): the key.
        takes (`list[str]`): the small models that it may name.

    Raises:
        ValueError: naming the key and what it takes.
    """
    word = getattr(job, name)
    if word in NAMES and word not in takes and not Path(word).exists():
        known = ", ".join(map(repr, takes))
        raise ValueError(
            f"{name}: {word!r} is a model of another kind; set it to {known}, a folder, or an id on the Hub"
        )


def check_device(device: str | None) -> None:
    """Refuse what names no device.

    Raises:
        ValueError: naming what to set.
    """
    if device is not None and not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", device):
        raise ValueError(f"device={shown(device)}: is none; set it to cpu or cuda, or leave it out")


def check_adapter(job: Any) -> None:
    """Refuse settings of an adapter without its rank.

    Raises:
        ValueError: naming the key.
    """
    check_fields(job, {"≥ 1": ("lora_r",)})
    if (job.lora_alpha or job.lora_target_modules) and not job.lora_r:
        raise ValueError("lora_r: missing; set the rank of the adapter")


def check_target(job: Any) -> None:
    """Refuse a job of influence that does not say, or says twice, what is judged.

    Raises:
        ValueError: naming the keys.
    """
    if not check_at_most_one(job, ("target", "target_split", "target_dataset")):
        raise ValueError("target_split: missing; say what to judge by target_split, target_dataset or target: self")
