"""`provenance.json`: how what lies beside it was made, of what, and the SHA-256 of each file; in a chain where it was made several times."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import first_line, read_json
from .allowed import CARD, RECORD
from .audited import Audited
from .origin import HubId, hub_id, revision_of
from .provenance import Provenance, hardware, library_versions, today


if TYPE_CHECKING:
    from os import PathLike


logger = logging.getLogger(__name__)


FORMAT = 1


def record_of(
    provenance: Provenance, earlier: Sequence[Mapping[str, Any]] = (), forget_set: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The record of an unlearned model, without its files.

    Args:
        provenance ([`Provenance`]): how it was made.
        earlier (`Sequence[dict]`, defaults to `()`): records of what its base model was made by, the oldest first: see [`earlier_of`].
        forget_set (`dict`, *optional*): `salt`, `digests` and `key_check`: see [`~hf_unlearn.hub.verify.in_forget_set`].
    """
    own = {"examples": provenance.forget_examples, "fingerprint": provenance.forget_fingerprint}
    return {
        "format": FORMAT,
        "kind": "unlearned model",
        "method": {
            "name": provenance.method,
            "title": provenance.method_title,
            "arxiv": provenance.paper,
            "stands_on": dict(provenance.stands_on),
        },
        "parent": _parent(provenance.base_model, provenance.base_revision, earlier),
        "forgotten": provenance.forgotten,
        "forget_set": own | dict(forget_set or {}),
        "config": dict(provenance.hyperparameters),
        "seed": provenance.seed,
        "steps": provenance.steps,
        "versions": dict(provenance.versions),
        "hardware": provenance.hardware,
        "created": provenance.created,
        "audit": None,
        "files": {},
        "earlier": list(earlier),
    }


def other_record(
    kind: str,
    *,
    method: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    earlier: Sequence[Mapping[str, Any]] = (),
    config: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """The record of something else, without its files: a filter, a report, a model of which no more is known.

    Args:
        kind (`str`): what it is, as in `"filter"`.
        method, base_model, base_revision, earlier, config, seed (*optional*): as far as they are known; see [`record_of`].
    """
    return {
        "format": FORMAT,
        "kind": kind,
        "method": None if method is None else dict(method),
        "parent": _parent(base_model, base_revision, earlier),
        "config": dict(config or {}),
        "seed": seed,
        "versions": library_versions(),
        "hardware": hardware(),
        "created": today(),
        "audit": None,
        "files": {},
        "earlier": list(earlier),
    }


def _parent(name: str | None, revision: str | None, earlier: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    newest = {**earlier[-1], "earlier": list(earlier[:-1])} if earlier else None
    return {
        "repository": hub_id(name),
        "revision": revision or revision_of(name),
        "provenance_sha256": None if newest is None else digest_of_record(newest),
    }


def digest_of_record(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record, however its JSON is written."""
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def earlier_of(
    base: str | PathLike | None, revision: str | None = None, token: str | bool | None = None
) -> list[dict[str, Any]]:
    """The chain of a base model, the oldest first, itself last; empty where it has none, and, which is said, where it cannot be read.

    Args:
        base, revision, token: see [`~hf_unlearn.hub.origin.said_of`].
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    if base is None:
        return []
    file, name = Path(base, RECORD), hub_id(base)
    try:
        if isinstance(base, HubId) or (name is not None and not file.is_file()):
            file = hf_hub_download(name, RECORD, revision=revision, token=token)
        record = read_record(file)
    except (FileNotFoundError, EntryNotFoundError, RepositoryNotFoundError):
        return []
    except (OSError, ValueError) as error:
        told = logger.warning if Path(file).is_file() else logger.info  # damaged, or out of reach
        told("provenance of %s cannot be read, so the chain begins anew: %s", base, first_line(error))
        return []
    chain = record.pop("earlier")
    return [*chain, record]


def read_record(path: str | PathLike) -> dict[str, Any]:
    """What a file says.

    Raises:
        ValueError: it is missing, damaged, or no record of this format.
    """
    record = read_json(path)
    earlier = record.get("earlier")
    if record.get("format") != FORMAT or not isinstance(earlier, list) or not all(map(_is_record, [*earlier, record])):
        raise ValueError(
            f"{path}: is no provenance that this version reads (format {FORMAT}); publish again with this version"
        )
    return record


def _is_record(values: Any) -> bool:
    """Whether a file's JSON has what is read of it: it may come from anybody."""
    if not isinstance(values, dict):
        return False
    parent, files, forget_set = values.get("parent"), values.get("files"), values.get("forget_set") or {}
    return (
        isinstance(parent, dict)
        and {"repository", "provenance_sha256"} <= parent.keys()
        and isinstance(files, dict)
        and all(isinstance(values.get(name), str) for name in ("kind", "created"))
        and isinstance(values.get("method") or {}, dict)
        and isinstance(values.get("audit") or {}, dict)
        and isinstance(forget_set, dict)
        and ("digests" not in forget_set or _are_digests(forget_set))
    )


def _are_digests(forget_set: Mapping[str, Any]) -> bool:
    salt, digests = forget_set.get("salt"), forget_set.get("digests")
    is_salt = isinstance(salt, str) and re.fullmatch("([0-9a-f]{2})+", salt)
    return bool(is_salt and isinstance(forget_set.get("key_check"), str) and isinstance(digests, list))


def write_record(record: Mapping[str, Any], folder: str | PathLike, names: Sequence[str]) -> None:
    """Write a record into a folder, with the files of these names as they are now."""
    folder = Path(folder)
    record = {**record, "files": files_of({name: folder / name for name in names if name != RECORD})}
    (folder / RECORD).write_bytes(as_bytes(record))


def as_bytes(record: Mapping[str, Any]) -> bytes:
    """The JSON text of a record."""
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()


def files_of(files: Mapping[str, Path | bytes]) -> dict[str, dict[str, Any]]:
    """SHA-256 and size of each file or content, by name."""
    return {name: sha256_of(part) for name, part in sorted(files.items())}


def sha256_of(part: Path | bytes) -> dict[str, Any]:
    """Of a file, or of content."""
    if isinstance(part, bytes):
        return {"sha256": hashlib.sha256(part).hexdigest(), "size": len(part)}
    with Path(part).open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": Path(part).stat().st_size}


def renewed(
    record: Mapping[str, Any] | None, files: Mapping[str, Path | bytes], audit: Audited | None
) -> dict[str, Any]:
    """The record of files that are published now.

    Args:
        record (`dict`, *optional*): what lies beside them; None: nothing is known of how they were made.
        files: path in the repository, and the file or its content, without the record's own.
        audit ([`~hf_unlearn.AuditReport`], *optional*): of them.

    Raises:
        ValueError: it is of other weights than these.
    """
    record = other_record("model") if record is None else dict(record)
    now = files_of(files)
    for name, known in record["files"].items():
        if name.endswith(".safetensors") and (name not in now or now[name] != known):
            raise ValueError(
                f"{RECORD}: is of other weights ({name} is not what it was); save the model again, or delete {RECORD} and {CARD} if they are "
                "of another one"
            )
    if audit is not None:
        record["audit"] = _of_audit(audit)
    return {**record, "files": now, "earlier": record["earlier"]}


def _of_audit(audit: Audited) -> dict[str, Any]:
    plain = json.loads(json.dumps(audit.to_dict(), default=str))
    return {
        "sha256": digest_of_record(plain),
        "verdict": audit.verdict.word,
        "why": audit.verdict.why,
        "decided_by": audit.verdict.decided_by,
        "checks": {one.name: one.status for one in audit.results},
        "failed": sorted(audit.failed),  # why may quote a file or an example
        "skipped": dict(audit.skipped),
        "unchecked": dict(audit.unchecked),
        "seed": audit.seed,
        "created": audit.created,
    }
