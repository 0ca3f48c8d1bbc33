"""What an audit found, on the card of the model that was audited."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from .origin import hub_id
from .text import line, shown


if TYPE_CHECKING:
    from huggingface_hub import EvalResult, EvalResultEntry, ModelCard


TEMPLATE = Path(__file__).with_name("audit_section.md.jinja")
SECTION = re.compile(r"\n## Audit\n.*?(?=\n## |\Z)", re.DOTALL)
RESULTS = ".eval_results/hf_unlearn.yaml"
PASSED = "within"  # the status of a check that passed


class Audited(Protocol):
    """What a card tells of an audit: see [`~hf_unlearn.AuditReport`]."""

    verdict: Any
    results: Sequence[Any]
    residual: Any
    skipped: Mapping[str, str]
    failed: Mapping[str, str]
    unchecked: Mapping[str, str]
    sizes: Mapping[str, int]
    seed: int
    created: str

    @property
    def passed(self) -> bool: ...

    def check_is_of(self, model: Any) -> None: ...

    def to_figures(self) -> Sequence[Any]: ...  # of [`~hf_unlearn.hub.card.Figure`]

    def to_eval_results(self, *, dataset_type: str, dataset_name: str, task: str) -> list[EvalResult]: ...

    def to_eval_entries(self, dataset_id: str) -> list[EvalResultEntry]: ...

    def to_dict(self) -> dict[str, Any]: ...


def with_audit(card: ModelCard, audit: Audited) -> ModelCard:
    """A card with a section on an audit, instead of that of an earlier one or of the sentence that there was none.

    Args:
        card (`ModelCard`): of the audited model; changed in place.
        audit ([`~hf_unlearn.AuditReport`]): of it.

    Returns:
        `ModelCard`: the same one. Its `model-index` has a figure a check.
    """
    section = audit_section(audit)
    text = card.text.rstrip() + "\n"
    if SECTION.search(text):
        text = SECTION.sub(lambda _: f"\n{section}", text, count=1)
    else:
        before, limits, after = text.partition("\n## Limitations\n")
        text = f"{before}\n{section}{limits}{after}"
    data = card.data
    titles = {figure.name for figure in audit.to_figures()}
    kept = [one for one in data.eval_results or () if one.dataset_split != "audit" and one.metric_name not in titles]
    first = kept[0] if kept else None
    found = audit.to_eval_results(
        dataset_type=first.dataset_type if first else "unknown",
        dataset_name=first.dataset_name if first else "unknown",
        task=data.get("pipeline_tag") or "other",
    )
    for one in found:
        one.dataset_split = "audit"
    data.eval_results = [*kept, *found] or None
    data.metrics = sorted({one.metric_type for one in data.eval_results or ()}) or None
    if not data.get("model_name"):
        data.model_name = "model"
    card.content = f"---\n{data.to_yaml()}\n---\n{text}"
    return card


def audit_section(audit: Audited) -> str:
    """`## Audit`, to the end of the section."""
    from jinja2 import Template

    status = {one.name: (one.status, one.in_words()) for one in audit.results}
    rows = [
        [line(figure.name), *(shown(value, figure.unit) for value in (figure.before, figure.after, figure.retrained))]
        + [status[figure.metric][0]]
        for figure in audit.to_figures()
    ]
    return Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True).render(
        word=audit.verdict.word,
        why=line(audit.verdict.why),
        decided_by=line(audit.verdict.decided_by),
        needs=[line(one) for one in audit.verdict.needs],
        rows=rows,
        residual=line(audit.residual.in_words()),
        beyond=[
            line(f"{one.title}: {one.in_words()} ({one.status})") for one in audit.results if one.status != PASSED
        ],
        unrun=[
            line(f"{name}: did not run, as audit.json says") for name in audit.failed
        ]  # why may quote a file or an example
        + [line(f"{name}: could not be done ({why})") for name, why in audit.skipped.items()]
        + [line(f"{name}: was not asked for ({why})") for name, why in audit.unchecked.items()],
        sizes=", ".join(f"{number:,} {line(name)}" for name, number in audit.sizes.items()),
        seed=audit.seed,
        created=audit.created,
    )


def results_of(card: str) -> dict[str, bytes]:
    """The figures of a card as the Hub's leaderboards read them, in `.eval_results/`: those measured on a dataset whose id on the Hub the card
    knows. The Hub's documentation calls `model-index`, where they stand too, legacy.

    Args:
        card (`str`): README.md.

    Returns:
        `dict[str, bytes]`: path in the repository, and content; empty without such figures.
    """
    from huggingface_hub import EvalResultEntry, ModelCard, eval_result_entries_to_yaml

    entries = [
        EvalResultEntry(
            dataset_id=one.dataset_type,
            dataset_revision=one.dataset_revision,
            task_id=".".join(part for part in (_word(one.dataset_split), _word(one.metric_type)) if part),
            value=one.metric_value,
            notes=" ".join(str(one.metric_name or one.metric_type).split()),
        )
        for one in ModelCard(card, ignore_metadata_errors=True).data.get("eval_results") or ()
        if "/" in str(one.dataset_type) and hub_id(one.dataset_type)
    ]
    if not entries:
        return {}
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), allow_unicode=True, sort_keys=False)
    return {RESULTS: text.encode()}


def _word(text: str | None) -> str:
    return re.sub(r"\W+", "_", text or "").strip("_").lower()
