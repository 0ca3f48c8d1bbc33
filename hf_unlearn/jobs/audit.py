"""The job of `hf-unlearn audit`: classifiers, language models and generators, with the rows, markers and references that a recipe names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.text import Text
from torch import Tensor

from .. import data
from ..audit.run import audit
from ..examples.datasets import load, one_split
from ..examples.named import GANS, NAMES, TEXT_TO_IMAGE, made
from ..files import loading
from .judging import classifier_of
from .keys import check_machine, console, device_of
from .language import readable
from .marking import class_numbers
from .selecting import rows_of, select


if TYPE_CHECKING:
    from datasets import Dataset

    from .recipe.audit import AuditJob


COLOURS = {
    "not forgotten": "bold red",
    "suppressed": "bold red",
    "forgotten": "bold green",
    "undetermined": "bold yellow",
}
FIRST = 100  # seed of the first reference; originals have those from 0 on
FIRST_CLASSIFIER = 1000


@dataclass(frozen=True)
class Rows:
    """What an audit is of: rows, or prompts alone.

    Attributes:
        forget, retain, test: as [`audit`][hf_unlearn.audit.run.audit] takes them.
    """

    forget: Dataset | list[str]
    retain: Dataset | list[str] | None
    test: Dataset | None


def run_audit(job: AuditJob) -> dict[str, Any]:
    """Audit, write the report, and say what came out.

    Raises:
        ValueError: something in the recipe does not fit the models or the data; nothing was written.
    """
    check_machine(job, "audit")
    # What is not there is said before others are trained.
    for key, names in (("model", [job.model]), ("original", [job.original]), ("retrained", job.retrained or [])):
        for name in names:
            _check_is_there(key, name, bool(job.marker))
    rows = _rows(job)
    checks = job.checks or ["standard"]
    report = audit(
        _folder(job.model),
        job.original and _folder(job.original),
        [*(job.retrained or ()), *_trained(job, rows)],
        rows.forget,
        rows.retain,
        rows.test,
        checks=checks[0] if checks in (["standard"], ["quick"]) else checks,
        seed=job.seed,
        output_dir=job.output_dir,
        device=device_of(job),
        dtype=getattr(torch, job.dtype or "float32"),
        **_of_generators(job, rows),
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


# Models


def _is_small(name: str) -> bool:
    return name in NAMES and not Path(name).exists()


def _folder(name: str) -> str:
    """A small model by its name is trained on first use."""
    return str(made(name)) if _is_small(name) else name


def _check_is_there(key: str, name: str | None, marked: bool) -> None:
    """Whether a model or a pipeline can be loaded by a name; its weights are not looked at.

    Raises:
        ValueError: naming the key.
    """
    if name is None or _is_small(name):
        return
    if marked:
        from diffusers import DiffusionPipeline

        with loading(key, name, "a pipeline"):
            DiffusionPipeline.load_config(name)
    elif Path(name, "model_index.json").is_file():
        raise ValueError(
            f"marker: missing, which sees what the pipeline {name!r} draws; set it to a classifier of images"
        )
    else:
        from transformers import AutoConfig

        with loading(key, name, "a model"):
            AutoConfig.from_pretrained(name)


def _trained(job: AuditJob, rows: Rows) -> list[str]:
    """Small models that never saw what was to be forgotten, as many as are asked for."""
    if not job.retrain:
        return []
    seeds = range(FIRST, FIRST + job.retrain)
    if job.original == "facts":
        from ..examples.facts import FactsRecipe, facts_model

        return [str(facts_model(FactsRecipe(without_forget=True, seed=seed))) for seed in seeds]
    gone = sorted(set(rows.forget[job.forget_column]))
    if job.original == "digits":
        from ..examples.classifier import cached_digits_classifier

        first = FIRST_CLASSIFIER - FIRST
        return [str(cached_digits_classifier(first + seed, without=gone)) for seed in seeds]
    if job.original in TEXT_TO_IMAGE:
        from ..examples.captions import WORDS
        from ..examples.text_to_image import TextToImageRecipe, text_to_image_model

        value = rows.forget.features[job.forget_column].int2str(gone[0])
        recipe = TextToImageRecipe(TEXT_TO_IMAGE[job.original], without=WORDS[job.forget_column][value][0])
        return [str(text_to_image_model(replace(recipe, seed=seed))) for seed in seeds]
    if job.original in GANS:
        from ..examples import gan as module
    else:
        from ..examples import ddpm as module
    recipe = module.NAMES[job.original]
    return [str(module.cached(replace(recipe, seed=seed), without=gone[0])) for seed in seeds]


# Rows


def _rows(job: AuditJob) -> Rows:
    if job.forget_prompts:
        forget, retain = job.forget_prompts, None
    else:
        parts = select(job, job.id_column)
        forget, retain = readable(job, parts.forget, "forget_dataset"), readable(job, parts.retain, "dataset")
    if job.retain_dataset:
        retain = readable(job, rows_of(job.retain_dataset, "retain_dataset", job.split), "retain_dataset")
    test = None
    if job.test_dataset:
        test = readable(job, rows_of(job.test_dataset, "test_dataset", job.test_split or "test"), "test_dataset")
    elif job.dataset and job.test_split:
        splits = load(job.dataset, revision=job.dataset_revision)
        test = readable(job, one_split(splits, "test_split", job.test_split), "test_split")
    return Rows(forget, job.retain_prompts or retain, test)


# Generators


def _of_generators(job: AuditJob, rows: Rows) -> dict[str, Any]:
    """What an audit of generators takes besides: who sees what images show, and how they are drawn."""
    if not job.marker:
        return {}
    drawing = {name: getattr(job, name) for name in ("num_inference_steps", "guidance_scale")}
    drawing = {name: value for name, value in drawing.items() if value is not None}
    if job.marker in TEXT_TO_IMAGE and not Path(job.marker).exists():
        return {"marker": _attribute_marker(job), "drawing": drawing}
    marker = classifier_of(job.marker, None, argument="marker")
    if job.classes:
        classes = class_numbers(job.classes, marker, key="classes", argument="marker", name=job.marker)
        return {"marker": (marker, classes), "drawing": drawing}
    count, labels = marker.model.config.num_labels, _labels(rows.forget)
    if not labels:
        raise ValueError(
            "classes: missing; the forget rows have no labels, so name the marker's classes that were to go"
        )
    if labels[-1] >= count:
        raise ValueError(f"marker={job.marker!r}: has {count} classes, so none is the dataset's {labels[-1]}")
    return {"marker": marker, "drawing": drawing}


def _labels(rows: Any) -> list[int]:
    if not data.label_column(rows):
        return []
    return sorted({one for one in data.labels_of(rows) if isinstance(one, int)})


def _attribute_marker(job: AuditJob) -> tuple[Any, list[int]]:
    """Who sees the digit, the colour or the ground of coloured digits, and the numbers of the values that were to go.

    Raises:
        ValueError: classes that are no words for what a picture shows, or for several kinds of it.
    """
    from ..examples.attributes import attribute_classifier
    from ..examples.captions import WORDS, meaning

    if not job.classes:
        raise ValueError(f"classes: missing, which marker={job.marker!r} needs; as in [three], or [red]")
    meanings = [meaning(word, "classes") for word in job.classes]
    kinds = {kind for kind, _ in meanings}
    if len(kinds) > 1:
        raise ValueError(
            f"classes: {' and '.join(job.classes)} are of {' and '.join(sorted(kinds))}; name those of one kind"
        )
    (kind,), values = kinds, list(WORDS[meanings[0][0]])
    classifier = attribute_classifier()

    def shown(images: Tensor) -> Tensor:
        return torch.tensor([values.index(value) for value in classifier(images)[kind]])

    return shown, sorted({values.index(value) for _, value in meanings})
