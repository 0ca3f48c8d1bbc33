"""The job of `hf-unlearn audit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ..audit.run import audit
from ..examples.classifier import cached_digits_classifier
from ..examples.datasets import load, one_split
from ..training.models import load_model
from .keys import console
from .selecting import select


if TYPE_CHECKING:
    from .recipe.audit import AuditJob


COLOURS = {
    "not forgotten": "bold red",
    "suppressed": "bold red",
    "forgotten": "bold green",
    "undetermined": "bold yellow",
}


def run_audit(job: AuditJob) -> dict[str, Any]:
    """Audit, write the report, and say what came out.

    Raises:
        ValueError: something in the recipe does not fit the models or the data; nothing was written.
    """
    load_model(job.model, None, None)  # what is not there is said before others are trained
    parts = select(job, job.id_column)
    test = one_split(load(job.dataset, revision=job.dataset_revision), "test_split", job.test_split)
    checks = job.checks or ["standard"]
    report = audit(
        job.model,
        str(cached_digits_classifier()) if job.original == "digits" else job.original,
        [*(job.retrained or ()), *_trained(job)],
        parts.forget,
        parts.retain,
        test,
        checks=checks[0] if checks in (["standard"], ["quick"]) else checks,
        seed=job.seed,
        output_dir=job.output_dir,
    )
    out, folder = console(), Path(job.output_dir)
    out.print(report.summary())
    for name, why in {**report.failed, **report.skipped}.items():
        out.print(Text.assemble(("not checked", "bold yellow"), f"  {name}: {why}"))
    out.print(Text.assemble((report.verdict.word, COLOURS[report.verdict.word]), f": {report.verdict.why}"))
    for need in report.verdict.needs:
        out.print(f"needs    {need}")
    out.print(f"report   {folder / 'audit.html'}, {folder / 'audit.json'}, {folder / 'audit.png'}", markup=False)
    return {
        "verdict": report.verdict.word,
        "why": report.verdict.why,
        "needs": report.verdict.needs,
        "not_checked": {**report.failed, **report.skipped},
        "figures": folder / "audit.json",
    }


def _trained(job: AuditJob) -> list[str]:
    """Models of the digits that never saw the forgotten ones, as many as are asked for."""
    without = [int(value) for value in job.forget_values] if job.retrain else []
    return [str(cached_digits_classifier(1000 + number, without=without)) for number in range(job.retrain)]
