"""The jobs of `hf-unlearn publish` and `hf-unlearn verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..audit.report import AuditReport
from ..hub.objects import publish
from ..hub.verify import verify_provenance


if TYPE_CHECKING:
    from .recipe.publish import PublishJob, VerifyJob


def run_publish(job: PublishJob) -> None:
    """Publish a folder, and say where it is.

    Raises:
        ValueError: it cannot be published, or not there; nothing was sent.
        OSError: the Hub did not take it.
    """
    publication = publish(
        job.folder,
        job.repo_id,
        audit=None if job.audit is None else AuditReport.load(job.audit),
        private=job.private,
        revision=job.revision,
        create_pr=job.create_pr,
        commit_message=job.commit_message,
        allow_adapter=job.allow_adapter,
        dry_run=job.dry_run,
    )
    print("nothing was sent (dry_run)" if publication.url is None else f"published  {publication.url}")


def run_verify(job: VerifyJob) -> None:
    """Print what is as it was published and what is not.

    Raises:
        ValueError: something is not.
        OSError: no such repository.
    """
    report = verify_provenance(job.source, job.revision, repo_type=job.repo_type)
    print(report)
    if not report.ok:
        raise ValueError(f"{job.source}: is not as it was published; see above")
