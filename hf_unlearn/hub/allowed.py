"""What of a folder may be published: an allow-list, since what is private cannot be listed in advance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ..files import PRIVATE


@dataclass(frozen=True)
class Weights:
    """Names of the files that hold a model's weights: a single one, or shards with their index."""

    stem: str

    @property
    def single(self) -> str:
        return f"{self.stem}.safetensors"

    @property
    def index(self) -> str:
        return f"{self.stem}.safetensors.index.json"

    @property
    def shard(self) -> str:
        return f"{self.stem}-" + "[0-9]" * 5 + "-of-" + "[0-9]" * 5 + ".safetensors"

    @property
    def names(self) -> tuple[str, ...]:
        return self.single, self.index, self.shard


TRANSFORMERS, DIFFUSERS = Weights("model"), Weights("diffusion_pytorch_model")
CONFIG, CARD, PIPELINE = "config.json", "README.md", "model_index.json"
RECORD = "provenance.json"  # is made anew where it is published
FILTERED, INNER = "FilteredPipeline", "pipeline"  # the class whose component of that name is a pipeline of its own
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"
PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
_CHAT_TEMPLATE = ("chat_template.jinja", "chat_template.json")
TEMPLATES = "additional_chat_templates"  # folder beside a tokenizer or a processor that has several
# All that tokenizers of transformers 5.23 call their files.
TOKENIZER = (
    "added_tokens.json", "bpe.codes", "byte_maps.json", "dict.txt", "emoji.json", "entity_vocab.json", "merges.txt",
    "normalizer.json", "prophetnet.tokenizer", "sentencepiece.bpe.model", "sentencepiece.model", "source.spm",
    "special_tokens_map.json", "spiece.model", "spm.model", "spm_char.model", "target.spm", "target_vocab.json", "tekken.json",
    "tokenizer.json", "tokenizer.model", "vocab-src.json", "vocab-tgt.json", "vocab.json", "vocab.txt",
    "word_pronunciation.json", "word_shape.json", *_CHAT_TEMPLATE,
)  # fmt: skip
_MODEL = {CONFIG: ("generation_config.json",)}  # and weights
_PROCESSOR = {
    "tokenizer_config.json": TOKENIZER,
    "preprocessor_config.json": (),
    "video_preprocessor_config.json": (),
    "processor_config.json": _CHAT_TEMPLATE,
}

# What may lie in the folder of a pipeline's component, by the config that says what kind of component it is.
COMPONENT = {**_MODEL, **_PROCESSOR, "scheduler_config.json": ()}
PIPELINE_ROOT = (CARD, PIPELINE, RECORD)
# Exact names wherever they are known: model*.safetensors would also let model_original.safetensors pass.
ALLOWED = (
    CARD,
    RECORD,
    CONFIG,
    *_MODEL[CONFIG],
    *TRANSFORMERS.names,
    ADAPTER_CONFIG,
    ADAPTER,
    LORA,
    *_PROCESSOR,
    *TOKENIZER,
)


def publishable_files(folder: str | Path) -> list[str]:
    """Files of `folder` that may be published: those at its root that [`ALLOWED`] names, the chat templates of a tokenizer that has
    several, and `pictures/*.png`.

    Of a pipeline, where `model_index.json` is there: [`PIPELINE_ROOT`], the pictures, and in the folders of the
    components that `model_index.json` names what belongs to that kind of component: see [`COMPONENT`].

    Links are left out, whatever they point to, and so are deeper folders, variants of weights (`*.fp16.safetensors`, which
    may be the original's) and shards that the index does not name (of an earlier save).

    Args:
        folder (`str` or `Path`): what `save_pretrained` wrote, with whatever else is there.

    Returns:
        `list[str]`: paths relative to `folder`, with `/`, sorted.

    Raises:
        ValueError: `folder` is not a folder, or a file that says what belongs to the model cannot be read.
    """
    folder = _folder(folder)
    components = components_of(folder)
    passed = _with_templates(folder, ALLOWED if components is None else PIPELINE_ROOT)
    folders = [folder / name for name in ("pictures", *(components or ()))]
    for inside in (path for path in folders if not path.is_symlink()):
        if components is not None and inside.name == INNER and is_filtered(folder):
            own = inner_files(inside)
        else:
            own = _with_templates(inside, ["*.png"] if inside.name == "pictures" else _component_names(inside))
        passed += [f"{inside.name}/{name}" for name in own]
    return sorted(passed)


def is_filtered(folder: Path) -> bool:
    """Whether a pipeline's index says that it is one with a filter around it."""
    return _json(folder, PIPELINE).get("_class_name") == FILTERED


def inner_files(folder: Path) -> list[str]:
    """Files of the pipeline inside a filtered one; its card and pictures are not for others, the outer one has its own."""
    if components_of(folder) is None:
        raise ValueError(f"folder={str(folder)!r}: holds no pipeline; save the filtered pipeline again")
    return [
        name for name in publishable_files(folder) if name not in (CARD, RECORD) and not name.startswith("pictures/")
    ]


def left_behind(folder: str | Path) -> dict[str, str]:
    """Files and links below `folder` that [`publishable_files`] leaves out, sorted, and why: what a push does not show anyone."""
    folder = _folder(folder)
    everything = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()
    }
    return {name: _why(folder, name) for name in sorted(everything.difference(publishable_files(folder)))}


def _why(folder: Path, name: str) -> str:
    path = Path(name)
    if any((folder / part).is_symlink() for part in (path, *path.parents[:-1])):
        return "a link"
    if PRIVATE in path.parts:
        return "private: it could undo the unlearning, or tells what was forgotten"
    if any(part.startswith("checkpoint-") for part in path.parts[:-1]):
        return "a half-trained state"
    if path.suffix in PICKLES:
        return "a pickle, or made of one: it may run code when it is loaded"
    for weights in (TRANSFORMERS, DIFFUSERS):
        if fnmatchcase(path.name, weights.shard) or path.name == weights.index:
            return "weights of an earlier save"
    if path.suffix == ".safetensors":
        return "weights that no stock from_pretrained asks for, or of another variant"
    return "not part of what is loaded"


def components_of(folder: Path) -> list[str] | None:
    """Components that the pipeline in `folder` is made of; None if it holds no pipeline."""
    if PIPELINE not in _passed(folder, PIPELINE_ROOT):
        return None
    names = [
        name
        for name, value in _json(folder, PIPELINE).items()
        # Others are settings of the pipeline, or [null, null] where an optional component is not there.
        if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
    ]
    for name in names:
        if not name.isidentifier() or name.startswith("_") or name == "pictures":
            raise ValueError(
                f"folder={str(folder)!r}: {PIPELINE} names {name!r}, which no component is called; save the pipeline again"
            )
    return names


def weights_of(folder: Path) -> Weights:
    """Names that the library which wrote the model's config gives to its weights."""
    return DIFFUSERS if "_class_name" in _json(folder, CONFIG) else TRANSFORMERS


def indexed_shards(folder: Path, weights: Weights) -> set[str]:
    try:
        return set(_json(folder, weights.index)["weight_map"].values())
    except (KeyError, TypeError, AttributeError) as error:
        raise unreadable(folder, weights.index) from error


def _json(folder: Path, name: str) -> dict:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise unreadable(folder, name) from error
    if not isinstance(content, dict):
        raise unreadable(folder, name)
    return content


def unreadable(folder: Path, name: str) -> ValueError:
    return ValueError(f"folder={str(folder)!r}: {name} cannot be read; save the model again")


def _folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r}: no such folder; pass the one the model was saved to")
    return folder


def _component_names(folder: Path) -> list[str]:
    kinds = _passed(folder, tuple(COMPONENT))
    names = [name for kind in kinds for name in (kind, *COMPONENT[kind])]
    return [*names, *weights_of(folder).names] if CONFIG in kinds else names


def _with_templates(folder: Path, allowed: Sequence[str]) -> list[str]:
    passed, inside = _passed(folder, allowed), folder / TEMPLATES
    has_some = {"tokenizer_config.json", "processor_config.json"}.intersection(passed) and not inside.is_symlink()
    return passed + [f"{TEMPLATES}/{name}" for name in (_passed(inside, ["*.jinja"]) if has_some else ())]


def _passed(folder: Path, allowed: Sequence[str]) -> list[str]:
    """Names of regular files that are allowed, without stale shards; none if there is no such folder."""
    if not folder.is_dir():
        return []
    files = (path.name for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    passed = {name for name in files if any(fnmatchcase(name, pattern) for pattern in allowed)}
    for weights in (TRANSFORMERS, DIFFUSERS):
        stale = {name for name in passed if fnmatchcase(name, weights.shard)}
        if weights.index in passed:
            stale -= indexed_shards(folder, weights)
        passed -= stale
    return sorted(passed)
