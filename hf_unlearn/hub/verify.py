"""Whether what was published is still what it was, and whether an example was in its forget set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any

from ..data import CONTENT, example_digest
from ..files import PRIVATE, first_line
from .allowed import RECORD, publishable_files
from .record import digest_of_record, read_record, sha256_of
from .superseded import superseded


KEY = "fingerprint.key"
KEY_CHECK = "the key of this forget set"  # what its own digest shows that a key is the right one
OTHERS = (".gitattributes",)  # of the Hub itself
OF_TRAINER = (
    "optimizer.*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "training_args.bin",
)  # which nothing loads a model from


@dataclass(frozen=True)
class ProvenanceReport:
    """What [`verify_provenance`] found.

    Args:
        source (`str`): where.
        revision (`str`, *optional*): the commit that was looked at.
        record (`dict`): what `provenance.json` says.
        differs (`tuple[str, ...]`): files whose SHA-256 is another one than it says.
        missing (`tuple[str, ...]`): files that it names and that are not there.
        extra (`tuple[str, ...]`): files that are there and that it does not name.
        loadable (`tuple[str, ...]`): those among the extra ones that a loader would take for a model, or for its settings.
        broken (`tuple[str, ...]`): links of the chain whose digest is not what the next one says.
    """

    source: str
    revision: str | None
    record: Mapping[str, Any]
    differs: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    loadable: tuple[str, ...]
    broken: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether all is as it was published. Files that no loader reads may have been added."""
        return not (self.differs or self.missing or self.loadable or self.broken)

    def __str__(self) -> str:
        record, at = self.record, f" at {self.revision[:12]}" if self.revision else ""
        lines = [
            f"{self.source}{at}: {'all' if self.ok else 'NOT all'} of {len(record['files'])} files are as they were published"
        ]
        for what, names in (
            ("differs", self.differs),
            ("missing", self.missing),
            ("added, and would be loaded", self.loadable),
            ("added", tuple(name for name in self.extra if name not in self.loadable)),
            ("chain broken", self.broken),
        ):
            lines += [f"  {what}: {name}" for name in names]
        for number, one in enumerate([*record["earlier"], record], start=1):
            method = (one.get("method") or {}).get("title") or one["kind"]
            forgotten = f", {one['forgotten']}" if one.get("forgotten") else ""
            parent = one["parent"]["repository"] or "a model that is not on the Hub"
            lines.append(f"  {number}. {one['created']}: {method}{forgotten}, from {parent}")
        audit = record.get("audit")
        lines.append("  no audit" if not audit else f"  audit: {audit.get('verdict')}: {audit.get('why')}")
        # A record may be anybody's, and no text of it moves the cursor.
        return "\n".join("".join(sign for sign in one_line if sign.isprintable()) for one_line in lines)


def verify_provenance(
    repo_id_or_folder: str | PathLike,
    revision: str | None = None,
    *,
    repo_type: str = "model",
    token: str | bool | None = None,
) -> ProvenanceReport:
    """Compute the SHA-256 of every file anew, and compare with `provenance.json` beside them.

    It shows that files were changed, not by whom: who can write to a repository can write another `provenance.json`. Keep the digest of
    the commit, or of the record, where others cannot change it.

    Args:
        repo_id_or_folder (`str` or `Path`): a folder, or a repository, which is downloaded.
        revision (`str`, *optional*): of a repository: branch, tag or commit. Default: `main`.
        repo_type (`str`, defaults to `"model"`): `"dataset"` of an influence report.
        token (`str` or `bool`, *optional*): of the Hub.

    Returns:
        [`ProvenanceReport`]: `print` it.

    Raises:
        ValueError: there is no provenance, or none that can be read.
        OSError: no such repository, or the Hub is out of reach.
    """
    folder, commit = Path(repo_id_or_folder), None
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r}: is of a repository, and {str(folder)!r} is a folder; leave it out"
            )
        present = None
    else:
        folder, present = _downloaded(str(repo_id_or_folder), revision, repo_type, token)
        commit = folder.name
    if not (folder / RECORD).is_file():
        raise ValueError(f"{repo_id_or_folder}: has no {RECORD}; it was not published by hf_unlearn.publish")
    record = read_record(folder / RECORD)
    everything = present
    if present is None:
        everything = [name for name in _all_files(folder) if not _stays(name)]
        present = publishable_files(folder) if record["kind"] != "influence report" else everything
    known = record["files"]
    missing = tuple(name for name in known if name not in present and not _inside(folder, name))
    differs = tuple(name for name, said in known.items() if name not in missing and sha256_of(folder / name) != said)
    loadable = tuple(superseded(everything, known))
    extra = tuple(sorted(set(present).union(loadable).difference(known, OTHERS, [RECORD])))
    return ProvenanceReport(
        str(repo_id_or_folder), commit, record, differs, missing, extra, loadable, tuple(_broken(record))
    )


def in_forget_set(
    provenance: Mapping[str, Any] | ProvenanceReport | str | PathLike, key: bytes | str | PathLike, example: Any
) -> bool:
    """Whether an example was in the forget set of a model, or of one that it was made from: for whoever holds the key.

    It shows what was asked to be forgotten, not that it was. The key is `_private/fingerprint.key` in the folder of the run; who has
    it not can try no example.

    Args:
        provenance (`dict`, [`ProvenanceReport`], `str` or `Path`): a record, what [`verify_provenance`] gave, `provenance.json`, or the
            folder that it is in.
        key (`bytes`, `str` or `Path`): the key, its file, or the folder of the run.
        example: a row as the forget dataset gives it, of which the content counts (image, text, messages, … where it has some of them,
            else every column); or the image or text alone.

    Raises:
        ValueError: no such key or record, a key of another run, or a record without digests.
    """
    if isinstance(provenance, ProvenanceReport):
        record = provenance.record
    elif isinstance(provenance, Mapping):
        record = provenance
    else:
        path = Path(provenance)
        record = read_record(path / RECORD if path.is_dir() else path)
    key = _key(key)
    sets = [one["forget_set"] for one in [*record["earlier"], record] if (one.get("forget_set") or {}).get("digests")]
    if not sets:
        raise ValueError("provenance: has no digests of examples")
    own = [one for one in sets if example_digest(KEY_CHECK, key, bytes.fromhex(one["salt"])) == one["key_check"]]
    if not own:
        raise ValueError("key: is of another run; take the one in its _private folder")
    forms = [example] if isinstance(example, Mapping) else [example, *({name: example} for name in CONTENT)]
    return any(
        example_digest(form, key, bytes.fromhex(one["salt"])) in one["digests"] for one in own for form in forms
    )


def _key(key: bytes | str | PathLike) -> bytes:
    if isinstance(key, bytes):
        return key
    path = Path(key)
    file = next((one for one in (path / PRIVATE / KEY, path / KEY, path) if one.is_file()), None)
    if file is None:
        raise ValueError(f"key={str(key)!r}: no such file, and no {KEY} in such a folder")
    return file.read_bytes()


def _downloaded(repo_id: str, revision: str | None, repo_type: str, token: Any) -> tuple[Path, list[str]]:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi(token=token).repo_info(repo_id, repo_type=repo_type, revision=revision)
        folder = snapshot_download(repo_id, repo_type=repo_type, revision=info.sha, token=token)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise OSError(
            f"{repo_id!r}: no such folder, and no such {repo_type} or revision on the Hub for this token"
        ) from error
    except (OSError, ValueError) as error:
        raise OSError(f"{repo_id!r}: is no folder, and cannot be had from the Hub ({first_line(error)})") from error
    return Path(folder), [file.rfilename for file in info.siblings or ()]


def _all_files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _stays(name: str) -> bool:
    """Whether a file of a run's folder is none that is published, whatever it is."""
    top, last = Path(name).parts[0], Path(name).name
    return top == PRIVATE or top.startswith("checkpoint-") or any(fnmatchcase(last, pattern) for pattern in OF_TRAINER)


def _inside(folder: Path, name: str) -> bool:
    """A file that a record names, in the folder and not elsewhere."""
    path = folder / name
    return path.is_file() and not Path(name).is_absolute() and ".." not in Path(name).parts


def _broken(record: Mapping[str, Any]) -> list[str]:
    chain = [*record["earlier"], record]
    found = ["records before 1. are missing"] if chain[0]["parent"]["provenance_sha256"] else []
    for number in range(1, len(chain)):
        before = {**chain[number - 1], "earlier": chain[: number - 1]}
        if chain[number]["parent"]["provenance_sha256"] != digest_of_record(before):
            found.append(f"{number}. is not what {number + 1}. was made from")
    return found
