"""What an audit found: the fields of its report, and nothing of how they are shown or kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .residual import ResidualMu
from .result import CheckResult
from .verdict import Verdict


@dataclass(frozen=True)
class AuditFindings:
    """What [`audit`][hf_unlearn.audit.run.audit] found; [`AuditReport`][hf_unlearn.audit.report.AuditReport] shows and keeps it.

    Args:
        verdict ([`Verdict`]): the word, the check that decided, its number, and what would settle it.
        results (`tuple[CheckResult, ...]`): of the checks that ran.
        residual ([`ResidualMu`]): how well the model is told from retrained ones.
        skipped (`dict[str, str]`): checks that were asked for and cannot be done with what was given, and why.
        failed (`dict[str, str]`): checks that did not run, and the error.
        unchecked (`dict[str, str]`): checks that there are and that were not asked for.
        models (`dict[str, str]`): names by role: `"audited"`, `"original"`, `"retrained 1"`, …
        model_digest (`str`): of the audited weights: whose report this is.
        forgotten (`str`): what was to be forgotten, in words.
        sizes (`dict[str, int]`): rows that were looked at, by part.
        family (`str`): `"classifier"`, …
        checks (`str`): `"standard"`, `"quick"` or `"chosen"`.
        seed (`int`): of all that is drawn.
        seconds, estimated_seconds (`float`): that it took, and what was said before.
        versions (`dict[str, str]`): of libraries.
        created (`str`): ISO date.
    """

    verdict: Verdict
    results: tuple[CheckResult, ...]
    residual: ResidualMu
    skipped: Mapping[str, str]
    failed: Mapping[str, str]
    unchecked: Mapping[str, str]
    models: Mapping[str, str]
    model_digest: str
    forgotten: str
    sizes: Mapping[str, int]
    family: str
    checks: str
    seed: int
    seconds: float
    estimated_seconds: float
    versions: Mapping[str, str]
    created: str

    def __getitem__(self, name: str) -> CheckResult:
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(f"{name!r}: not in the report (it has {', '.join(one.name for one in self.results)})")
