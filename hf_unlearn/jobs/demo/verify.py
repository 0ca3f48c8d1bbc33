"""VERIFY: attack the unlearned model, attack models that never saw the class, and say how far apart they are."""

from __future__ import annotations

from datasets import Dataset

from hf_unlearn.audit import audit
from hf_unlearn.audit.report import AuditReport

from .forget import Corrected, Forgotten, train
from .stage import Stage


REFERENCES = 5  # with fewer an audit's margins are too wide to say much


def play(stage: Stage, corrected: Corrected, forgotten: Forgotten, test: Dataset) -> AuditReport:
    """Train the models to compare with, and audit."""
    stage.say(f"training {REFERENCES - 1} more classifiers that never saw a {stage.forgotten}")
    others = [
        train(stage, forgotten.retain, f"retrained/without-{stage.forgotten}-{number}", number)
        for number in range(1, REFERENCES)
    ]
    report = audit(
        forgotten.model,
        original=corrected.model,
        retrained=[forgotten.retrained, *others],
        forget=forgotten.forget,
        retain=forgotten.retain,
        test=test,
        checks="quick",
        seed=stage.seed,
        output_dir=stage.folder / "audit",
        progress=False,
    )
    judged = [one for one in report.results if one.layer != "beside"]
    within = sum(one.status == "within" for one in judged)
    stage.say(f"{len(judged)} checks, {within} within their margins; {report.residual.in_words()}")
    stage.say(f"verdict: {report.verdict}")
    return report
