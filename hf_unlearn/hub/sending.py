"""One commit that holds all of what is published, or nothing of it; and a line that says why not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import first_line, sized
from .audited import RESULTS
from .origin import as_id, check_is_not_original_repository
from .superseded import superseded


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi


logger = logging.getLogger(__name__)

TYPES = ("model", "dataset", "space")
# By status of an answer: what it means of a push, and what to do.
ANSWERS = {
    401: "the Hub does not know the token; log in (hf auth login), or pass token=",
    403: "the token may not write there; take one with write access, or a repository of your own",
    404: "there is no such repository, branch or owner for this token; look at the name",
    409: "somebody else changed the repository at the same time; publish again",
    412: "somebody else changed the repository at the same time; publish again",
    413: "the Hub takes no files of this size in one commit; save in smaller shards (max_shard_size=)",
    429: "the Hub asks to wait; publish again in some minutes",
}


@dataclass(frozen=True)
class Publication:
    """What is published, or with `dry_run=True` would be.

    Args:
        repo_id (`str`): with its owner, where that is known.
        repo_type (`str`): `"model"` or `"dataset"`.
        files (`dict[str, int]`): paths in the repository, and their bytes.
        left_out (`dict[str, str]`, defaults to `{}`): files of the folder that stay, and why.
        deleted (`tuple[str, ...]`, defaults to `()`): files of the repository that the commit deletes: they are of an earlier model.
        private (`bool`, *optional*): of a repository that is made now; None: as the owner has set it.
        is_new (`bool`, *optional*): whether the repository is made now; None where nobody looked.
        commit ([`~huggingface_hub.CommitInfo`] or a `Future` of it, *optional*): None of a dry run.
    """

    repo_id: str
    repo_type: str
    files: Mapping[str, int]
    left_out: Mapping[str, str]
    deleted: tuple[str, ...] = ()
    private: bool | None = None
    is_new: bool | None = None
    commit: CommitInfo | Future[CommitInfo] | None = None

    @property
    def url(self) -> str | None:
        """Of the pull request, or else of the commit; None of a dry run, and as long as it is uploaded in the background."""
        if self.commit is None or isinstance(self.commit, Future):
            return None
        return self.commit.pr_url or self.commit.commit_url

    def __str__(self) -> str:
        seen = {True: "private", False: "public", None: "as its owner has set"}[self.private]
        new = {True: f"new, {seen}", False: "there already", None: f"if it is new: {seen}"}[self.is_new]
        kind = "" if self.repo_type == "model" else f"{self.repo_type} "
        lines = [f"{kind}{self.repo_id} ({new})"]
        lines += [f"  + {name}  {sized(size)}" for name, size in sorted(self.files.items())]
        lines += [f"  - {name}  deleted, of an earlier model" for name in self.deleted]
        lines += [f"    {name}  left out: {why}" for name, why in _by_folder(self.left_out)]
        return "\n".join(lines)


def send(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    originals: Iterable[str | None] = (),
    left_out: Mapping[str, str] | None = None,
    repo_type: str = "model",
    token: str | bool | None = None,
    revision: str | None = None,
    private: bool | None = True,
    commit_message: str = "Upload",
    create_pr: bool = False,
    run_as_future: bool = False,
    dry_run: bool = False,
    show: Callable[[str], Any] = logger.info,
) -> Publication:
    """Make one commit of all the files, which also deletes what is left of an earlier model; see [`superseded`].

    Args:
        files: path in the repository, and the file or its content.
        show (callable): is given a text that says what goes up and what does not, before anything does.
        repo_id, …: see [`~hf_unlearn.hub.publish.publish_folder`].

    Raises:
        ValueError: no name of a repository, the original's, or one of another type.
        OSError: no token, or the Hub did not take it: in one line with what to do. The repository is as it was; one that was made for
            this push is empty.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    originals = list(originals)
    repo_id = check_repo_id(repo_id)
    check_is_not_original_repository(repo_id, originals)
    sizes = {name: len(part) if isinstance(part, bytes) else part.stat().st_size for name, part in files.items()}
    publication = Publication(repo_id, repo_type, sizes, left_out or {}, private=private)
    api = HfApi(token=token)
    if dry_run:
        publication = _looked_at(api, publication, revision, originals)
        show(str(publication))
        return publication
    check_token(token)
    repo_id = with_owner(repo_id, token)
    with explained(repo_id):
        check_is_not_original_repository(repo_id, originals, api=api)
        is_new = not api.repo_exists(repo_id, repo_type=repo_type)
        if is_new:
            _check_type(api, repo_id, repo_type)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type).repo_id
        check_is_not_original_repository(repo_id, originals, api=api)  # it may have been renamed to that
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True, repo_type=repo_type)
        parent, present = _present(api, repo_id, repo_type, revision)
    old = _superseded(present, files, repo_type)
    publication = replace(publication, repo_id=repo_id, is_new=is_new, deleted=old)
    show(str(publication))
    operations = [
        CommitOperationAdd(name, part if isinstance(part, bytes) else str(part)) for name, part in files.items()
    ]
    operations += [CommitOperationDelete(name, is_folder=False) for name in old]

    def commit() -> CommitInfo:
        with explained(repo_id):
            api.preupload_lfs_files(
                repo_id,
                [one for one in operations if isinstance(one, CommitOperationAdd)],
                repo_type=repo_type,
                revision=revision,
                create_pr=create_pr,
                free_memory=False,
            )
            # Files that a .gitignore names are left out of the commit without a word, by huggingface_hub 2.4.
            ignored = [one.path_in_repo for one in operations if getattr(one, "_should_ignore", False)]
            if ignored:
                raise OSError(
                    f"{repo_id}: nothing was published: the repository's .gitignore leaves out {ignored[0]}; delete that line of it"
                )
            return api.create_commit(
                repo_id,
                operations,
                commit_message=commit_message,
                repo_type=repo_type,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent,
            )

    return replace(publication, commit=api.run_as_future(commit) if run_as_future else commit())


def check_repo_id(repo_id: Any) -> str:
    """The id that is meant.

    Raises:
        ValueError: none that the Hub would take.
    """
    found = as_id(repo_id) if isinstance(repo_id, str) else None
    if found is None:
        raise ValueError(
            f"repo_id={str(repo_id)[:120]!r}: is no name of a repository; name it as in 'me/model' (letters, digits, '-', '_' and '.')"
        )
    return found


def with_owner(repo_id: str, token: str | bool | None) -> str:
    """An id with the name of whoever the token is of, where it has no owner.

    Raises:
        OSError: no token, or the Hub does not know it.
    """
    from huggingface_hub import HfApi

    if "/" in repo_id:
        return repo_id
    check_token(token)
    with explained(repo_id):
        return f"{HfApi(token=token).whoami()['name']}/{repo_id}"


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Says in one line what went wrong between here and the Hub in a `with` block, and what to do.

    Raises:
        OSError: instead of the errors of huggingface_hub and of the connection.
    """
    # HTTPError is that of httpx, or in huggingface_hub 2 of httpx2: there it has the right one.
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise OSError(_NO_TOKEN) from error
    except OfflineModeIsEnabled as error:
        raise OSError(f"{repo_id}: nothing was published: HF_HUB_OFFLINE is set; unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = ANSWERS.get(status)
        if why is None:
            said = (error.server_message or first_line(error)).split("\n")[0]
            why = "the Hub has trouble; publish again later" if status >= 500 else f"it says: {said}"
        raise OSError(f"{repo_id}: nothing was published ({status}): {why}") from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise OSError(
            f"{repo_id}: the connection to the Hub broke ({type(error).__name__}); a commit is there whole or not at all: publish again, "
            "which changes nothing if it is there"
        ) from error


_NO_TOKEN = "token: there is none; log in (hf auth login), set HF_TOKEN, or pass token="


def check_token(token: str | bool | None) -> None:
    from huggingface_hub import get_token

    if token is False or (not isinstance(token, str) and get_token() is None):
        raise OSError(_NO_TOKEN)


def _check_type(api: HfApi, repo_id: str, repo_type: str) -> None:
    for other in TYPES:
        if other != repo_type and api.repo_exists(repo_id, repo_type=other):
            raise ValueError(
                f"repo_id={repo_id!r}: is a {other}'s repository, and this goes into a {repo_type}'s; choose another name"
            )


def _present(api: HfApi, repo_id: str, repo_type: str, revision: str | None) -> tuple[str | None, list[str]]:
    """The commit that is the newest now, and the files in it."""
    info = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
    return info.sha, [file.rfilename for file in info.siblings or ()]


def _superseded(present: Iterable[str], files: Iterable[str], repo_type: str) -> tuple[str, ...]:
    if repo_type == "model":
        figures = {RESULTS}.intersection(present).difference(files)  # of an earlier model
        return tuple(sorted({*superseded(present, files), *figures}))
    earlier = {name for name in present if fnmatchcase(name, "data/*.parquet")}  # load_dataset would read both
    return tuple(sorted(earlier.difference(files)))


def _looked_at(api: HfApi, publication: Publication, revision: str | None, originals: list) -> Publication:
    """Whether the repository is there, and what would be deleted from it, as far as can be seen without writing."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    repo_id, repo_type = publication.repo_id, publication.repo_type
    try:
        with explained(repo_id):
            repo_id = with_owner(repo_id, api.token)
            check_is_not_original_repository(repo_id, originals, api=api)
            try:
                _, present = _present(api, repo_id, repo_type, revision)
            except RevisionNotFoundError:  # a branch that is made of the main one
                _, present = _present(api, repo_id, repo_type, None)
            except RepositoryNotFoundError:
                _check_type(api, repo_id, repo_type)
                return replace(publication, repo_id=repo_id, is_new=True)
    except OSError as error:
        logger.warning("dry_run: the repository was not looked at (%s)", first_line(error))
        return publication
    old = _superseded(present, publication.files, repo_type)
    return replace(publication, repo_id=repo_id, is_new=False, deleted=old)


def _by_folder(left_out: Mapping[str, str]) -> list[tuple[str, str]]:
    """A line for a file at the top, and one for each folder and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, why in left_out.items():
        top, slash, _ = name.partition("/")
        found.setdefault((top + slash, why), []).append(name)
    return [
        (names[0] if len(names) == 1 else f"{top} ({len(names):,} files)", why)
        for (top, why), names in sorted(found.items())
    ]
