"""The keys of `hf-unlearn publish` and `hf-unlearn verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass
class PublishJob:
    """Publishes what a run saved, in one commit, to a repository on the Hub.

    Args:
        folder (`str`): what to publish: the `output_dir` of a run, or any folder that a model, a pipeline or a filter was saved to.
        repo_id (`str`): where to: `name` or `owner/name`; made if it is not there.
        audit (`str`, *optional*): `audit.json` of this model: its figures and its verdict come onto the card.
        private (`bool`, defaults to `True`): only where the repository is made now.
        revision (`str`, *optional*): branch, made if it is not there. Default: main.
        create_pr (`bool`, defaults to `False`): make it a pull request.
        commit_message (`str`, *optional*): first line of the commit.
        allow_adapter (`bool`, defaults to `False`): accept an adapter without its base. Whoever takes it off has the original.
        dry_run (`bool`, defaults to `False`): say what would go up, what stays and why, and send nothing.

    Raises:
        ValueError: a key that is missing, or no such file or folder.
    """

    folder: str | None = None
    repo_id: str | None = None
    audit: str | None = None
    private: bool = True
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    allow_adapter: bool = False
    dry_run: bool = False

    def __post_init__(self):
        for name, example in (
            ("folder", "the folder that a run saved to"),
            ("repo_id", "the repository, as in me/model"),
        ):
            if not getattr(self, name):
                raise ValueError(f"{name}: missing; name {example}: hf-unlearn publish FOLDER REPO_ID")
        if not Path(self.folder).is_dir():
            raise ValueError(f"folder: {self.folder!r} is no folder; name the one that a run saved to")
        if self.audit is not None and not Path(self.audit).is_file():
            raise ValueError(f"audit: {self.audit!r} is no file; name the audit.json that hf-unlearn audit wrote")
        if self.create_pr and self.revision not in (None, "main"):
            raise ValueError("create_pr: a pull request is made against main; leave revision out")


@dataclass
class VerifyJob:
    """Computes the SHA-256 of every published file anew, and says what is not as it was.

    Args:
        source (`str`): a repository on the Hub, or a folder.
        revision (`str`, *optional*): of a repository: branch, tag or commit. Default: main.
        repo_type (`str`, defaults to `"model"`): `dataset` of an influence report.

    Raises:
        ValueError: a key that is missing.
    """

    source: str | None = None
    revision: str | None = None
    repo_type: Literal["model", "dataset"] = "model"

    def __post_init__(self):
        if not self.source:
            raise ValueError("source: missing; name a repository or a folder: hf-unlearn verify REPO_ID")
