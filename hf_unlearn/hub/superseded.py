"""What lies in a repository already and would be loaded beside, or instead of, the model that is pushed now."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from .allowed import ADAPTER_CONFIG, CONFIG, PIPELINE, TEMPLATES, TOKENIZER


# Whatever its name: load_lora_weights takes any .safetensors or .bin that it finds, from_single_file any checkpoint.
WEIGHTS = (
    ".bin", ".ckpt", ".dduf", ".flashpack", ".gguf", ".h5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".ot", ".pb", ".pt",
    ".pt2", ".pth", ".safetensors", ".tflite",
)  # fmt: skip
# model.safetensors.index.json, and of a variant model.safetensors.index.fp16.json or model.fp16.safetensors.index.json
INDEX = re.compile(r".+\.(safetensors|bin|h5|msgpack|ckpt)\.(.+\.)?index\.(.+\.)?json")
# Those by which a folder is recognised as one that something is loaded from; config.json may be anybody's.
SETTINGS = (
    ADAPTER_CONFIG, PIPELINE, "generation_config.json", "modular_config.json", "modular_model_index.json",
    "*preprocessor_config.json", "processor_config.json", "scheduler_config.json", "tokenizer_config.json",
)  # fmt: skip
BESIDE = (CONFIG, *TOKENIZER)


def superseded(present: Iterable[str], pushed: Iterable[str]) -> list[str]:
    """Files of a repository that a push deletes, in the commit that it makes.

    All weights, indices and settings of models, pipelines, adapters and processors that are not pushed again, at every depth
    (`subfolder=` reaches them all), in every format and variant: a loader would prefer them, fall back to them, or find
    the model of before in them. Cards, pictures, code and everything else stays.

    Args:
        present (`Iterable[str]`): paths in the repository.
        pushed (`Iterable[str]`): paths that the commit writes.

    Returns:
        `list[str]`: sorted.
    """
    present = set(present)
    loaded = {name for name in present if _is_loaded(PurePosixPath(name).name)}
    folders = {PurePosixPath(name).parent for name in loaded} | {PurePosixPath(".")}
    beside = {name for name in present if _beside(PurePosixPath(name)) in folders}
    return sorted((loaded | beside).difference(pushed))


def _beside(path: PurePosixPath) -> PurePosixPath | None:
    """The folder of a model or a processor that it would be read with."""
    if path.suffix == ".jinja" and path.parent.name == TEMPLATES:
        return path.parent.parent
    return path.parent if path.name in BESIDE else None


def _is_loaded(name: str) -> bool:
    is_weights = PurePosixPath(name).suffix in WEIGHTS or INDEX.fullmatch(name)
    return bool(is_weights) or any(fnmatchcase(name, pattern) for pattern in SETTINGS)
