"""The model card of an unlearned model: what was forgotten, how, the figures, and what they do not show."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .audited import Audited, with_audit
from .origin import hub_id
from .provenance import Provenance, library_versions, today
from .text import all_tags, line, one_line, shown


if TYPE_CHECKING:
    from huggingface_hub import ModelCard, ModelCardData
    from jinja2 import Template


TAGS = ("machine-unlearning", "hf_unlearn")
TEMPLATE = Path(__file__).with_name("unlearning_card.md.jinja")
PLAIN = Path(__file__).with_name("plain_card.md.jinja")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number and what to compare it with.

    Args:
        metric (`str`): id of the metric on the Hub, as in `"accuracy"`.
        name (`str`): what the table calls it, as in `"Accuracy on the forgotten class"`.
        after (`float`): of the unlearned model; this one goes to `model-index`.
        before (`float`, *optional*): of the model that unlearning started from.
        retrained (`float`, *optional*): of a model trained without the forget set.
        split (`str`, defaults to `"test"`): of the data it was measured on.
        unit (`str`, defaults to `"%"`): of all three; `""` for plain numbers.
        target (`float`, *optional*): a check: `after` passes if it is at most this.

    Raises:
        ValueError: a number that is not finite.
    """

    metric: str
    name: str
    after: float
    before: float | None = None
    retrained: float | None = None
    split: str = "test"
    unit: str = "%"
    target: float | None = None

    def __post_init__(self) -> None:
        for name in ("before", "after", "retrained", "target"):
            value = getattr(self, name)
            if value is None and name != "after":
                continue
            if value is None or not math.isfinite(value):
                raise ValueError(f"{name}={value} of {self.name!r}: must be a finite number; leave the figure out")

    @property
    def check(self) -> tuple[bool, str] | None:
        """Whether it passed, and the line that says so; None without a target."""
        if self.target is None:
            return None
        passed, bound = self.after <= self.target, shown(self.target, self.unit)
        held = f"{'at most' if passed else 'more than'} the {bound} that count as forgotten"
        return passed, f"{self.name} ({self.split}): {shown(self.after, self.unit)}, {held}."

    @property
    def change(self) -> str | None:
        """What was measured before and after, in words; None where there is no before."""
        if self.before is None:
            return None
        return f"{self.name} ({self.split}): {shown(self.before, self.unit)} → {shown(self.after, self.unit)}"


def unlearning_card(
    provenance: Provenance,
    *,
    model_name: str,
    task: str | None = None,
    pipeline_tag: str | None = None,
    library_name: str = "transformers",
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    language: str | Sequence[str] | None = None,
    datasets: str | Sequence[str] | None = None,
    base_model: str | None = None,
    base_model_relation: str | None = "finetune",
    tags: Sequence[str] = (),
    results: Sequence[Figure] = (),
    failed_checks: Sequence[str] = (),
    passed_checks: Sequence[str] = (),
    limitations: Sequence[str] = (),
    load_snippet: str | None = None,
    picture: str | None = None,
    dataset_name: str = "unknown",
    dataset_type: str = "unknown",
) -> ModelCard:
    """The card of an unlearned model.

    Args:
        provenance ([`Provenance`]): how it was made.
        model_name (`str`): title, and name in `model-index`.
        task (`str`, *optional*): task in `model-index`. Default: `pipeline_tag`.
        pipeline_tag (`str`, *optional*): task of the model on the Hub, as in `"image-classification"`. Of a pipeline:
            see [`diffusion_task`].
        library_name (`str`, defaults to `"transformers"`): what loads the model: `"diffusers"` for a pipeline.
        license (`str`, *optional*): id of the license, as in `"apache-2.0"`.
        license_name, license_link (`str`, *optional*): of a license that the Hub has no id for (`license="other"`).
        language (`str` or `Sequence[str]`, *optional*): codes, as in `"en"`.
        datasets (`str` or `Sequence[str]`, *optional*): ids on the Hub of what the model was trained on.
        base_model (`str`, *optional*): id on the Hub, where the provenance names none. Default: the provenance's.
        base_model_relation (`str`, *optional*, defaults to `"finetune"`): what it is to its base model; `"adapter"` for a LoRA.
        tags (`Sequence[str]`, defaults to `()`): besides [`TAGS`].
        results (`Sequence[Figure]`, defaults to `()`): what was measured. Without any, the card says so.
        failed_checks, passed_checks (`Sequence[str]`, defaults to `()`): one line for each check that was run, besides those
            of figures with a target. Without any, the card says that none was.
        limitations (`Sequence[str]`, defaults to `()`): besides those that every unlearned model has.
        load_snippet (`str`, *optional*): Python that loads the model: see [`loading_code`]. Default: no such section.
        picture (`str`, *optional*): path beside the card, as in `"pictures/classes.png"`.
        dataset_name (`str`, defaults to `"unknown"`): of the data measured on, for readers.
        dataset_type (`str`, defaults to `"unknown"`): of the data measured on: its id on the Hub.

    Returns:
        `ModelCard`: `card.save(folder / "README.md")` writes it.

    Raises:
        ValueError: a picture that a push would leave behind.
    """
    from huggingface_hub import EvalResult, ModelCardData

    if picture is not None and (Path(picture).parent.as_posix() != "pictures" or not picture.endswith(".png")):
        raise ValueError(f"picture={picture!r}: must be pictures/NAME.png, the only pictures that are published")
    base_id = hub_id(provenance.base_model)
    evaluations = [
        EvalResult(
            task_type=task or pipeline_tag or "other",
            dataset_type=dataset_type,
            dataset_name=one_line(dataset_name),
            dataset_split=figure.split,
            metric_type=figure.metric,
            metric_name=one_line(figure.name),
            metric_value=float(figure.after),
        )
        for figure in results
    ]
    cited = [(provenance.method_title, provenance.paper), *provenance.stands_on.items()]
    checks = [figure.check for figure in results if figure.check is not None]
    checks += [(False, one) for one in failed_checks] + [(True, one) for one in passed_checks]
    data = ModelCardData(
        base_model=base_id or base_model,
        base_model_relation=base_model_relation if base_id or base_model else None,
        datasets=datasets or None,
        eval_results=evaluations or None,
        language=language or None,
        library_name=library_name,
        license=license,
        license_link=license_link,
        license_name=license_name,
        metrics=sorted({figure.metric for figure in results}) or None,
        model_name=one_line(model_name),
        pipeline_tag=pipeline_tag,
        tags=all_tags(TAGS, tags),
    )
    return _filled(
        data,
        TEMPLATE,
        model_name=line(model_name),
        method=line(provenance.method),
        method_title=line(provenance.method_title),
        paper=provenance.paper,
        stands_on=provenance.stands_on,
        forgotten=line(provenance.forgotten),
        forget_examples=provenance.forget_examples,
        forget_fingerprint=provenance.forget_fingerprint,
        base_model_link=_base_model_link(provenance.base_model, base_id),
        base_revision=provenance.base_revision,
        steps=provenance.steps,
        seed=provenance.seed,
        created=provenance.created,
        hyperparameters=[
            (name, line(json.dumps(value, ensure_ascii=False)))
            for name, value in sorted(provenance.hyperparameters.items())
        ],
        hardware=line(provenance.hardware),
        versions=", ".join(f"{name} {number}" for name, number in provenance.versions.items()),
        rows=[
            [line(figure.name), line(figure.split)]
            + [shown(value, figure.unit) for value in (figure.before, figure.after, figure.retrained)]
            for figure in results
        ],
        citations=[(_bibtex(name), id) for name, id in cited if id],
        has_retrained=any(figure.retrained is not None for figure in results),
        has_before=any(figure.before is not None for figure in results),
        measured=next((line(figure.change) for figure in results if figure.change), None),
        failed_checks=[line(one) for passed, one in checks if not passed],
        passed_checks=[line(one) for passed, one in checks if passed],
        limitations=[line(limitation) for limitation in limitations],
        load_snippet=load_snippet,
        picture=picture,
    )


def plain_card(
    model_name: str,
    library_name: str,
    load_snippet: str | None,
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    nearest: str | None = None,
    pipeline_tag: str | None = None,
    audit: Audited | None = None,
    **metadata: Any,
) -> ModelCard:
    """The card of a model or a pipeline of which nothing is known but what it is.

    Args:
        model_name, library_name, load_snippet, base_model, pipeline_tag: see [`unlearning_card`]; no snippet where nothing here loads it.
        base_revision (`str`, *optional*): commit of `base_model`.
        nearest (`str`, *optional*): id on the Hub of what `base_model` was made from, where it is not there itself.
        audit ([`~hf_unlearn.AuditReport`], *optional*): of it.
        metadata: license, language, tags and datasets.
    """
    from huggingface_hub import ModelCardData

    tags, base_id = metadata.pop("tags", None) or (), hub_id(base_model)
    data = ModelCardData(
        base_model=base_id or nearest,
        library_name=library_name,
        model_name=one_line(model_name),
        pipeline_tag=pipeline_tag,
        tags=all_tags("hf_unlearn", tags),
        **metadata,
    )
    card = _filled(
        data,
        PLAIN,
        title=line(model_name),
        base_model_link=_base_model_link(base_model, base_id),
        base_revision=base_revision,
        load_snippet=load_snippet,
        created=today(),
        versions=", ".join(f"{name} {number}" for name, number in library_versions().items()),
    )
    return card if audit is None else with_audit(card, audit)


@cache
def _template(path: Path) -> Template:
    from jinja2 import Template

    return Template(path.read_text(encoding="utf-8"))


def _filled(data: ModelCardData, template: Path, **values: Any) -> ModelCard:
    """As `ModelCard.from_template`, which compiles its template each time: a run makes its card twice, before it trains and after."""
    from huggingface_hub import ModelCard

    return ModelCard(_template(template).render(card_data=data.to_yaml(), **(data.to_dict() | values)))


def _bibtex(text: str) -> str:
    """Text that closes no field of an entry."""
    return " ".join(re.sub(r"[{}\\`<>]", "", text).split())


def _base_model_link(base_model: str | None, hub_id: str | None) -> str | None:
    if base_model is None:
        return None
    if hub_id is None:
        return "a model that is not on the Hub"
    return f"[{hub_id}](https://huggingface.co/{hub_id})"
