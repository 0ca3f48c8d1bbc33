"""What a filter is: its configuration, its actions, its verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from ..hub.allowed import TOKENIZER


# What a download takes besides a name, and which files of a filter, an encoder or a pipeline it may bring.
DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies")
SUFFIXES = tuple(sorted({"safetensors", *(name.rpartition(".")[2] for name in TOKENIZER)}))
SCHEMA_VERSION = 1


ACTIONS = ("blank", "flag")


class Verdict(NamedTuple):
    """What a filter says: `flags`, bool `[n]`, True where an input is not released; `scores`, fp32 `[n, concepts]`."""

    flags: Tensor
    scores: Tensor


@dataclass
class FilterOutput(ModelOutput):
    """What a filter gives back.

    Args:
        images: as they were given, those that are not released blanked (unless `action="flag"`).
        flags (`list[bool]`): True where an input is not released.
        scores (`Tensor`): fp32 `[n, concepts]`, on the CPU.
    """

    images: Any = None
    flags: list[bool] | None = None
    scores: Tensor | None = None


class FASTConfig(PreTrainedConfig):
    """What [`FASTSafetyChecker`] consists of, and how it was made.

    Args:
        schema_version (`int`): of this file; another one is refused.
        concepts (`list[dict]`): of each: `name`, `description`, `score`, `shrinkage`, `threshold` (with its promise) and
            `figures`. The thresholds that count are in the weights.
        embedding_size (`int`): numbers an embedding.
        components, directions (`int`): of the quadratic forms; 0 without.
        encoder_spec (`dict`, *optional*): see [`FilterEncoder.spec`]; None: the inputs are a generator's latents.
        encoder_fingerprint (`str`, *optional*): of an encoder that is not stored.
        fingerprint (`str`, *optional*): of scores and thresholds.
        action (`str`): `"blank"` or `"flag"`: what a call does to what is not released.
    """

    model_type = "fast_safety_checker"

    schema_version: int = 0  # a file without it is no file of ours
    concepts: list | None = None
    embedding_size: int = 0
    components: int = 0
    directions: int = 0
    encoder_spec: dict | None = None
    encoder_fingerprint: str | None = None
    fingerprint: str | None = None
    action: str = "blank"
