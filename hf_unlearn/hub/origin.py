"""Which repository on the Hub a name means, and what of the original no push may touch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from yaml import YAMLError

from .allowed import ADAPTER_CONFIG, CARD, CONFIG, PIPELINE, is_filtered


if TYPE_CHECKING:
    from huggingface_hub import HfApi


_CACHED = re.compile(r"/models--([^/]+)/snapshots/([^/]+)")  # a folder of the Hub's cache
_CLONED = re.compile(r"^\s*url\s*=\s*(\S+)", re.MULTILINE)  # of a remote in .git/config
INHERITED = ("license", "license_name", "license_link", "language", "datasets")
LOADED_FROM, ADAPTER_BASE = "_name_or_path", "base_model_name_or_path"  # keys of configs
_HOSTS = ("huggingface.co", "hf.co")


class HubId(str):
    """An id that was no folder when it was loaded: a folder of that name that is made later changes nothing."""


def origin(name: str | Path | None) -> str | None:
    """What to remember of a model that is loaded by `name` now: the absolute path of a folder, or a [`HubId`]; None of one that was
    loaded from nowhere, whose name is empty (and as a path would be the working directory).
    """
    if not name or isinstance(name, HubId):
        return name or None
    if Path(name).exists():
        return str(Path(name).resolve())
    return str(name) if (found := as_id(str(name))) is None else HubId(found)


def hub_id(name: str | Path | None) -> str | None:
    """The id on the Hub that a name means; None for a folder that is not from there.

    Args:
        name (`str` or `Path`, *optional*): an id, a link to the Hub, a folder of the Hub's cache or a clone of a repository.
    """
    if name is None:
        return None
    if not isinstance(name, HubId):
        if found := _cached(name):
            return as_id(found[1].replace("--", "/"))
        if Path(name).exists():
            return _cloned_from(Path(name))
    return as_id(str(name))


def revision_of(name: str | Path | None) -> str | None:
    """The commit that a folder of the Hub's cache holds; None for others."""
    found = None if name is None or isinstance(name, HubId) else _cached(name)
    return found[2] if found else None


def origins_of(pipeline: Any) -> list[str]:
    """Names of the folders and repositories that a pipeline of diffusers and its components were loaded from, without those of
    a pipeline that lay in a filtered one: its repository is not that of an original.
    """
    parts = [pipeline, *getattr(pipeline, "components", {}).values()]
    names = [getattr(getattr(part, "config", None), "_name_or_path", None) for part in parts]
    names += [getattr(part, "name_or_path", None) for part in parts]
    return sorted({str(name) for name in names if name and not _in_filtered(str(name))})


def keep_origins(pipeline: Any) -> None:
    """Write absolute paths where a pipeline of diffusers and its components say by a relative one from which folder they were loaded:
    what that means changes with the working directory.
    """
    for part in (pipeline, *getattr(pipeline, "components", {}).values()):
        config = getattr(part, "config", None)
        name = getattr(config, "_name_or_path", None) or getattr(part, "name_or_path", None)
        if not name or Path(name).is_absolute() or not Path(name).exists():
            continue
        if hasattr(part, "register_to_config"):
            part.register_to_config(_name_or_path=origin(name))
        elif hasattr(config, "_name_or_path"):
            config._name_or_path = origin(name)
        else:
            part.name_or_path = origin(name)


def named_in(folder: Path) -> list[str]:
    """What the card, the adapter and the configs in a folder say that the model was made from. A card names ids, whatever folders there are."""
    from huggingface_hub import metadata_load

    card, adapter = folder / CARD, folder / ADAPTER_CONFIG
    said = (metadata_load(card) or {}).get("base_model") if card.is_file() else None
    ids = [name for name in (said if isinstance(said, list) else [said]) if isinstance(name, str)]
    names: list[Any] = [HubId(found) if (found := as_id(name)) else name for name in ids]
    if adapter.is_file():
        names.append(json.loads(adapter.read_text(encoding="utf-8")).get(ADAPTER_BASE))
    if not (
        (folder / PIPELINE).is_file() and is_filtered(folder)
    ):  # whose pipeline's repository is not that of an original
        configs = (folder / PIPELINE, folder / CONFIG, *folder.glob(f"*/{CONFIG}"))
        names += [json.loads(file.read_text(encoding="utf-8")).get(LOADED_FROM) for file in configs if file.is_file()]
    return [name for name in names if isinstance(name, str) and name]


def without_local_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without where its model was loaded from, if that is a folder on this machine: diffusers 0.42 and PEFT write it."""
    found = {key: hub_id(config[key]) for key in (LOADED_FROM, ADAPTER_BASE) if isinstance(config.get(key), str)}
    kept = {key: value for key, value in config.items() if key not in found}
    return kept | {key: name for key, name in found.items() if name is not None or key == ADAPTER_BASE}


def inherited(said: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a model: what is given, and else what [`said_of`] its base model holds for it too."""
    if "license" in given:  # another one, which has another name
        said = {key: value for key, value in said.items() if not key.startswith("license")}
    return {**said, **given}


def said_of(base: str | None, revision: str | None = None, token: str | bool | None = None) -> dict[str, Any]:
    """What the card of a base model says that holds for a model made from it too: license, languages and datasets.

    Args:
        base (`str`, *optional*): see [`origin`].
        revision (`str`, *optional*): of its repository.
        token (`str` or `bool`, *optional*): of the Hub.

    Returns:
        `dict`: metadata of a card; nothing where there is none, or the Hub is out of reach.
    """
    from huggingface_hub import hf_hub_download, metadata_load

    if base is None:
        return {}
    file, name = Path(base, CARD), hub_id(base)
    try:
        if isinstance(base, HubId) or (name is not None and not file.is_file()):
            file = hf_hub_download(name, CARD, revision=revision, token=token)
        said = metadata_load(file) or {}
    except (OSError, ValueError, YAMLError):
        return {}
    found = {key: said[key] for key in INHERITED if said.get(key)}
    if name is None:  # the nearest one that others can look up
        names = said.get("base_model") or ()
        further = [known for name in ([names] if isinstance(names, str) else names) if (known := hub_id(name))]
        found |= {"base_model": further[0]} if further else {}
    return found


def check_is_not_original_repository(
    repo_id: str, originals: Iterable[str | None], *, api: HfApi | None = None
) -> None:
    """Refuse to push onto the original, whose history keeps it, also as a pull request.

    Args:
        repo_id (`str`): where to, as it was named or as the Hub resolved it.
        originals: names that what is pushed was made from.
        api (`HfApi`, *optional*): to ask what the originals are called now: repositories are renamed.

    Raises:
        ValueError: they are one repository.
    """
    from huggingface_hub.errors import HfHubHTTPError

    wanted = (as_id(repo_id) or repo_id).casefold()
    for name in {hub_id(name) for name in originals}.difference({None}):
        names = {name.casefold()}
        if api is not None and wanted not in names and "/" in name:
            with suppress(HfHubHTTPError):  # gone, or not for this token
                names.add(api.model_info(name).id.casefold())
        if wanted in names:
            raise ValueError(
                f"repo_id: {repo_id!r} is the original's repository, whose history keeps it; choose another"
            )


def as_id(name: str) -> str | None:
    """The id in a name, or in a link to the Hub; None where there is none."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    hosts = "|".join(map(re.escape, (*_HOSTS, urlsplit(constants.ENDPOINT).netloc)))
    linked = re.match(rf"(?:hf://|(?:\w+://)?(?:[^/@]*@)?(?:www\.)?(?:{hosts})[/:])(?:models/)?(.+)", name.strip())
    text = name.strip().rstrip("/")
    if linked:
        whole = re.split(r"/(?:tree|blob|resolve|commits?)/", linked[1])[0]
        text = "/".join(whole.split("@")[0].split("/")[:2]).rstrip("/").removesuffix(".git")
    try:
        validate_repo_id(text)
    except HFValidationError:
        return None
    return text


def _cached(name: str | Path) -> re.Match[str] | None:
    path = Path(name)  # which may be a link to there
    return _CACHED.search((path.resolve() if path.exists() else path).as_posix())


def _cloned_from(folder: Path) -> str | None:
    """Of a clone, or of a component's folder in one."""
    for parent in (folder, folder.resolve().parent):
        if (config := parent / ".git" / "config").is_file():
            links = _CLONED.findall(config.read_text(encoding="utf-8", errors="replace"))
            return next((found for link in links if not Path(link).exists() and (found := as_id(link))), None)
    return None


def _in_filtered(name: str) -> bool:
    folder = Path(name)
    return any((part / PIPELINE).is_file() and is_filtered(part) for part in (folder, *folder.parents[:2]))
