"""A file or a folder is whole or not there, and what cannot be loaded is named. Imports torch only to read or write tensors."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError


if TYPE_CHECKING:
    import torch
    from torch import Tensor


PRIVATE = "_private"  # folder of an output_dir: what could undo the unlearning, or tells what was forgotten


@contextmanager
def kept_private(path: str | Path) -> Iterator[Path]:
    """For a file or a folder that is written in a `with` block: the folders above it are made, and what lies below a folder called
    `_private` is the owner's alone (0700, files 0600), whatever the umask says. Others are left as they are.
    """
    path = Path(path)
    inside = [part for part in (path, *path.parents) if PRIVATE in part.parts]
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in reversed(inside):
        if folder != path:
            folder.chmod(0o700)
    yield path
    if inside and path.exists():
        for written in (path, *path.rglob("*")):
            if not written.is_symlink():
                written.chmod(0o700 if written.is_dir() else 0o600)


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a `.safetensors` file through a temporary name, so that a kill never leaves half of one."""
    from safetensors.torch import save_file

    with kept_private(path) as path:
        partial = path.with_name(path.name + ".partial")
        save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, partial, metadata)
        partial.replace(path)


def load_tensors(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read what [`save_tensors`] wrote.

    Raises:
        ValueError: the file is damaged.
    """
    from safetensors.torch import load_file

    with undamaged(path):
        tensors = load_file(path)
    return {name: value.to(device) for name, value in tensors.items()}  # safetensors 0.8 refuses "cpu:0" (gloo)


def write_json(values: Mapping[str, Any], path: str | Path) -> None:
    """Write a JSON file through a temporary name; what JSON cannot hold is written as text."""
    with kept_private(path) as path:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(values, default=str), encoding="utf-8")
        partial.replace(path)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Raises:
        ValueError: the file is damaged.
    """
    with undamaged(path):
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"holds a {type(values).__name__}")
    return values


@contextmanager
def undamaged(path: str | Path) -> Iterator[None]:
    """Names a file that cannot be read in a `with` block.

    Raises:
        ValueError: the file is missing, or not what was written.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; restore it from a copy, or start again") from error
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}); restore it from a copy, or start again") from error


@contextmanager
def complete_or_not_there(folder: str | Path) -> Iterator[Path]:
    """A scratch folder that becomes `folder` at the end of a `with` block; nothing is left where the block fails."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        yield Path(scratch)
        try:
            shutil.copytree(scratch, unfinished := folder.with_name(f"{folder.name}.{os.getpid()}"))
            os.replace(unfinished, folder)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            if not folder.is_dir():  # else another process was faster
                raise


def first_line(error: BaseException) -> str:
    """What an error says first, without the full stop; its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


@contextmanager
def loading(argument: str, name: Any, kind: str) -> Iterator[None]:
    """Names what is loaded in a `with` block where that fails.

    Raises:
        ValueError: the block could not load it; as in "model='me/nothing': neither a folder with a model nor an id on the Hub (…)".
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{argument}={str(name)!r}: its weights are damaged ({first_line(error)}); restore the file from a copy"
        ) from error
    except (OSError, ValueError) as error:
        said = _something_else(str(name), kind)
        said = said or f"neither a folder with {kind} nor an id on the Hub ({first_line(error)})"
        raise ValueError(f"{argument}={str(name)!r}: {said}") from error


def _something_else(name: str, kind: str) -> str:
    """What to say of a name that is plainly not the one of such a thing; nothing where it may be."""
    if (address := re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)", name)) is not None:
        return f"is an address; give the id alone, {address[1]!r}"
    folder, is_pipeline = Path(name), "pipeline" in kind.lower()
    if folder.is_absolute() and not folder.exists():
        return f"there is no such folder; give a folder with {kind}, or an id on the Hub"
    if folder.is_file():
        return f"is a file; give a folder with {kind}, or an id on the Hub"
    if not is_pipeline and (folder / "model_index.json").is_file():
        return f"holds a pipeline (model_index.json); give a folder with {kind}, or an id on the Hub"
    if is_pipeline and (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
        return f"holds a single model (config.json); give a folder with {kind}, or an id on the Hub"
    return ""


def sized(size: float) -> str:
    """A number of bytes, as people write it."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB"
