"""What of a folder may be published: an allow-list, since what is private cannot be listed in advance."""

from __future__ import annotations

import json
import re
from concurrent.futures import Future
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
_SHARD = "model-" + "[0-9]" * 5 + "-of-" + "[0-9]" * 5 + ".safetensors"

# Exact names wherever they are known: model*.safetensors would also let model_original.safetensors pass.
ALLOWED = (
    "README.md",
    "config.json",
    "generation_config.json",
    SINGLE,
    INDEX,
    _SHARD,
    ADAPTER_CONFIG,
    ADAPTER,
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "pictures/*.png",
)


def publishable_files(folder: str | Path) -> list[str]:
    """Files of `folder` that may be published: those at its root, or in `pictures/`, that [`ALLOWED`] names.

    Links are left out, whatever they point to, and so are shards that the index does not name (of an earlier save).

    Args:
        folder (`str` or `Path`): what `save_pretrained` wrote, with whatever else is there.

    Returns:
        `list[str]`: paths relative to `folder`, with `/`, sorted.

    Raises:
        ValueError: `folder` is not a folder, or its index of shards cannot be read.
    """
    folder = _folder(folder)
    passed = [path.name for path in _regular_files(folder) if _allowed(path.name)]
    pictures = folder / "pictures"
    if pictures.is_dir() and not pictures.is_symlink():
        passed += [f"pictures/{path.name}" for path in _regular_files(pictures) if _allowed(f"pictures/{path.name}")]
    stale = {name for name in passed if fnmatchcase(name, _SHARD)}
    if INDEX in passed:
        stale -= _indexed_shards(folder)
    return sorted(set(passed) - stale)


def left_behind(folder: str | Path) -> list[str]:
    """Files and links below `folder` that [`publishable_files`] leaves out, sorted: what a push does not show anyone."""
    folder = _folder(folder)
    everything = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()
    }
    return sorted(everything.difference(publishable_files(folder)))


def check_publishable(folder: str | Path, *, allow_adapter: bool = False) -> list[str]:
    """[`publishable_files`] of a folder that holds one whole model.

    Args:
        folder (`str` or `Path`): what would be published.
        allow_adapter (`bool`, defaults to `False`): accept an adapter without its base model. Whoever takes it off has
            the model from before the unlearning.

    Raises:
        ValueError: no weights, shards missing, two sets of weights side by side, or an adapter without `allow_adapter`.
    """
    files = publishable_files(folder)
    missing = sorted(_indexed_shards(Path(folder)).difference(files)) if INDEX in files else []
    sharded = INDEX in files and not missing
    if SINGLE in files:
        # Stock from_pretrained takes model.safetensors then, which is the older of the two if the last save was sharded.
        if sharded:
            raise ValueError(
                f"folder={str(folder)!r}: has both {SINGLE} and {INDEX}; delete the one of an earlier save"
            )
        files = [name for name in files if name != INDEX and not fnmatchcase(name, _SHARD)]
    elif missing:
        raise ValueError(
            f"folder={str(folder)!r}: {INDEX} names {missing[0]}, which is not there; save the model again"
        )
    whole = SINGLE in files or sharded
    if ADAPTER_CONFIG in files:
        if whole:
            # from_pretrained would put the adapter onto these weights; if they are the original, they undo everything.
            raise ValueError(
                f"folder={str(folder)!r}: has both weights and {ADAPTER_CONFIG}; "
                "save the merged model into an empty folder and publish that"
            )
        if not allow_adapter:
            raise ValueError(
                "allow_adapter=False: an adapter can be taken off, which undoes the unlearning; "
                "publish merged weights (merge_adapter=True), or pass allow_adapter=True"
            )
    if not whole and not {ADAPTER_CONFIG, ADAPTER} <= set(files):
        raise ValueError(f"folder={str(folder)!r}: no {SINGLE} to publish; save the model there first (not as a link)")
    return files


def publish_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload unlearned model",
    allow_adapter: bool = False,
    run_as_future: bool = False,
) -> CommitInfo | Future[CommitInfo]:
    """Uploads the publishable files of `folder` and nothing else; files that are on the Hub already are never deleted.

    Args:
        folder (`str` or `Path`): holds a saved model.
        repo_id (`str`): `"name"` or `"owner/name"`; made if it is not there.
        token (`str` or `bool`, *optional*): of the Hub. Default: the one saved by `hf auth login`.
        revision (`str`, *optional*): branch, made if it is not there. Default: `main`.
        private (`bool`, *optional*): only where the repository is made now. Default: the owner's setting.
        commit_message (`str`, defaults to `"Upload unlearned model"`): first line of the commit.
        allow_adapter (`bool`, defaults to `False`): see [`check_publishable`].
        run_as_future (`bool`, defaults to `False`): upload in the background. `folder` must stay as it is until then.

    Returns:
        `CommitInfo`, or a `Future` of it with `run_as_future=True`.

    Raises:
        ValueError: see [`check_publishable`]; before anything is sent.
    """
    files = check_publishable(folder, allow_adapter=allow_adapter)

    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message,
        allow_patterns=as_patterns(files),
        run_as_future=run_as_future,
    )


def as_patterns(files: list[str]) -> list[str]:
    """Patterns that `upload_folder` matches with these files and no other: it reads names as patterns, whose `*` crosses `/`."""
    return [re.sub(r"([*?[])", r"[\1]", name) for name in files]


def _folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r}: no such folder; pass the one the model was saved to")
    return folder


def _regular_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and not path.is_symlink()]


def _allowed(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in ALLOWED)


def _indexed_shards(folder: Path) -> set[str]:
    try:
        return set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"folder={str(folder)!r}: {INDEX} cannot be read; save the model again") from error
