"""Where an unlearned model comes from: what a reader needs to redo the job, and no example that was forgotten."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any


PACKAGES = ("hf_unlearn", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "diffusers")


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that shape a result, without importing them."""
    return dict(_versions())


@cache  # of a process: they are read from disk
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def hardware() -> str:
    """What this process computes on, in words; nothing that names the machine."""
    import torch

    kind, cores = (
        platform.machine(),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    )
    if not torch.accelerator.is_available():
        return f"{kind} CPU, {cores} core{'s' * (cores != 1)}"
    count = torch.accelerator.device_count()
    device = torch.accelerator.current_accelerator()
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    return f"{count} × {name}, {kind} CPU"


def today() -> str:
    return datetime.now(UTC).date().isoformat()


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How an unlearned model was made.

    Args:
        method (`str`): short name, as in `"PBU"`.
        method_title (`str`): what the card calls it, as in `"Partially blinded unlearning"`.
        forgotten (`str`): what was forgotten, in words, as in `"class 3"`.
        forget_examples (`int`): size of the forget set, > 0.
        seed (`int`): of the training.
        steps (`int`): optimiser steps taken, ≥ 0.
        paper (`str`, *optional*): arXiv id, as in `"2403.16246"`.
        stands_on (`dict[str, str]`, defaults to `{}`): names of other work that it is made of, and their arXiv ids.
        base_model (`str`, *optional*): id on the Hub, or a path, of the model before unlearning; a
            [`~hf_unlearn.hub.origin.HubId`] where it is known to be an id.
        base_revision (`str`, *optional*): commit of `base_model`.
        hyperparameters (`dict`, defaults to `{}`): JSON values; those that define the method or differ from defaults.
        forget_fingerprint (`str`, *optional*): keyed digest of the forget set, never the data.
        versions (`dict`, *optional*): of libraries. Default: [`library_versions`].
        hardware (`str`, *optional*): what it was trained on. Default: [`hardware`].
        created (`str`, *optional*): ISO date. Default: today, UTC.

    Raises:
        ValueError: a field that is no JSON value, or a number out of range.
    """

    method: str
    method_title: str
    forgotten: str
    forget_examples: int
    seed: int
    steps: int
    paper: str | None = None
    stands_on: dict[str, str] = field(default_factory=dict)
    base_model: str | None = None
    base_revision: str | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    forget_fingerprint: str | None = None
    versions: dict[str, str] = field(default_factory=library_versions)
    hardware: str = field(default_factory=hardware)
    created: str = field(default_factory=today)

    def __post_init__(self) -> None:
        if self.forget_examples < 1:
            raise ValueError(f"forget_examples={self.forget_examples}: must be at least 1")
        if self.steps < 0:
            raise ValueError(f"steps={self.steps}: must be 0 or more")
        for name, value in self.hyperparameters.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(f"hyperparameters[{name!r}]={value!r}: must be a finite JSON value") from error
