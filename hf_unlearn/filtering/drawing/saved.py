"""A filtered pipeline in a folder: `model_index.json`, the pipeline in `pipeline/`, its filter in `safety_checker/`.

No class of diffusers finds its components in such an index, so none loads what is inside without the filter: not
[`DiffusionPipeline`], which does not know the class, and not the class of the pipeline inside or another.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from ...hub.allowed import FILTERED as CLASS_NAME
from ...hub.allowed import INNER as PIPELINE
from ...hub.allowed import PIPELINE as INDEX
from ..config import DOWNLOAD_OPTIONS, SUFFIXES


SCHEMA_VERSION = 1
FILTER = "safety_checker"
FILTER_CLASS = ["hf_unlearn", "FASTSafetyChecker"]
# Settings of the pipeline that are written into the index.
SETTINGS = ("action", "max_tries")
_LIBRARIES = ("diffusers", "hf_unlearn")


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in DOWNLOAD_OPTIONS if name in kwargs}


def class_of(pipeline: DiffusionPipeline) -> list[str]:
    """`[library, class]` of a pipeline that can be loaded by these names.

    Raises:
        ValueError: a class of another library.
    """
    kind = type(pipeline)
    names = [kind.__module__.split(".")[0], kind.__name__]
    if _find(*names) is not kind:
        raise ValueError(
            f"pipeline: {kind.__module__}.{kind.__name__} is not of {' or '.join(_LIBRARIES)}, cannot be loaded again"
        )
    return names


def load_inner(folder: Path, index: dict[str, Any], **kwargs) -> DiffusionPipeline:
    """The pipeline inside of a saved filtered one."""
    library, name = index[PIPELINE]
    kind = _find(library, name)
    inside = folder / PIPELINE
    if kind is None:
        raise ValueError(f"{INDEX}: {PIPELINE}=[{library!r}, {name!r}] is no pipeline of {' or '.join(_LIBRARIES)}")
    if (found := read_index(inside).get("_class_name")) != name:
        raise ValueError(f"{inside / INDEX}: is of a {found}, must be of a {name} as {INDEX} says")
    return kind.from_pretrained(inside, **({"use_safetensors": True} | kwargs))


def load_plain(name_or_path: str | Path, index: dict[str, Any], **kwargs) -> DiffusionPipeline:
    """A pipeline that has no filter, with our classes for those that diffusers does not know."""
    name = index.get("_class_name")
    kind = _find("hf_unlearn", name) if isinstance(name, str) else None
    return (kind or DiffusionPipeline).from_pretrained(name_or_path, **kwargs)


def is_filtered(index: dict[str, Any]) -> bool:
    return index.get("_class_name") == CLASS_NAME


def fetch(name_or_path: str | Path, **hub) -> tuple[dict[str, Any], Path]:
    """The index of a saved pipeline, and its folder; of one on the Hub only the index is in there."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        try:
            folder = Path(hf_hub_download(str(name_or_path), INDEX, **hub)).parent
        except RemoteEntryNotFoundError as error:
            raise ValueError(f"{name_or_path}: has no {INDEX}, so it holds no whole pipeline") from error
    return read_index(folder), folder


def fetch_all(name_or_path: str | Path, folder: Path, **hub) -> Path:
    """The folder of a saved filtered pipeline, of the commit that its index came from."""
    if Path(name_or_path).is_dir():
        return folder
    patterns = [f"{part}/*.{suffix}" for part in (PIPELINE, FILTER) for suffix in SUFFIXES]
    hub = {**hub, "revision": folder.name}
    return Path(snapshot_download(str(name_or_path), allow_patterns=[INDEX, *patterns], **hub))


def read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{folder}: has no {INDEX} that can be read, so it holds no whole pipeline") from error
    except ValueError as error:
        raise ValueError(f"{file}: cannot be read; save the pipeline again") from error
    if not isinstance(index, dict):
        raise ValueError(f"{file}: cannot be read; save the pipeline again")
    return index


def check_index(index: dict[str, Any], folder: Path) -> None:
    """
    Raises:
        ValueError: an index of a filtered pipeline that is of another version or not whole.
    """
    file = folder / INDEX
    if index.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{file}: schema_version={index.get('schema_version')!r}, this version reads {SCHEMA_VERSION}"
        )
    if index.get(FILTER) != FILTER_CLASS:
        raise ValueError(f"{file}: {FILTER}={index.get(FILTER)!r}, must be {FILTER_CLASS}: the filter is missing")
    inside = index.get(PIPELINE)
    if not isinstance(inside, list) or len(inside) != 2 or not all(isinstance(name, str) for name in inside):
        raise ValueError(f"{file}: {PIPELINE}={inside!r}, must be a library and a class")
    for part in (PIPELINE, FILTER):
        if not (folder / part).is_dir():
            raise ValueError(f"{folder}: has no folder {part}, which {INDEX} names")
    if missing := [name for name in SETTINGS if name not in index]:
        raise ValueError(f"{file}: {missing[0]} is missing; save the pipeline again")


def write_index(folder: Path, pipeline: list[str], settings: dict[str, Any]) -> None:
    index = {
        "_class_name": CLASS_NAME,
        "_diffusers_version": diffusers.__version__,
        "schema_version": SCHEMA_VERSION,
        PIPELINE: pipeline,
        FILTER: FILTER_CLASS,
        **settings,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _find(library: str, name: str) -> type[DiffusionPipeline] | None:
    """An exported pipeline class; no module is imported that a file names."""
    if library not in _LIBRARIES or name == CLASS_NAME:
        return None
    kind = getattr(import_module(library), name, None)
    is_pipeline = isinstance(kind, type) and issubclass(kind, DiffusionPipeline) and kind is not DiffusionPipeline
    return kind if is_pipeline else None
