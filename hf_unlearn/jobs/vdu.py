"""The job of `hf-unlearn unlearn --method vdu`: a diffusion pipeline forgets, and a classifier counts before and after."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .. import data, small_ddpm
from ..demo import cached_digits_classifier
from ..diffusion import resolution
from ..hub.card import Figure
from ..images import pixels
from ..metrics.features import ClassifierFeatures, Features, features_of
from ..metrics.generation import class_shift, frechet_distance, percentage_unlearned
from ..task import check_processes
from ..unlearning.vdu import VDUConfig, VDUTrainer
from .unlearn import Parts, UnlearnJob, resume_argument, select


if TYPE_CHECKING:
    from datasets import Dataset


METHODS = {"vdu": (VDUConfig, VDUTrainer)}
MEASURE_SEED = 5  # apart from the noise of grids and replay


@dataclass
class VDUJob(UnlearnJob):
    """Which diffusion model forgets what: the keys of a recipe with `method: vdu` besides those of [`VDUConfig`].

    What is forgotten is said as for classifiers, by `forget_column`, `forget_ids` or `forget_dataset`, or by the config's
    `forget_prompts`, which need no dataset.

    Args:
        model (`str`): `"digits-ddpm"` or `"fashion-mnist-ddpm"` (small models, trained on first use: minutes), the folder or
            the id of a pipeline.
        classifier (`str`, *optional*): counts what is drawn before and after: `"digits"`, a folder or an id of an image
            classifier. Its classes are those of the dataset.
        forget_limit (`int`, *optional*): use at most so many of the forget rows, drawn by the seed.
        measure_samples (`int`, defaults to 500): images drawn before and after for it.
        eval_split (`str`, *optional*): split whose rows that are not forgotten are the reference of the Fréchet distance.
    """

    _methods = METHODS

    method: Literal["vdu"] | None = field(default=None, metadata={"help": "vdu"})
    classifier: str | None = field(
        default=None, metadata={"help": "Counts samples before and after: 'digits', a folder, or an id on the Hub."}
    )
    forget_limit: int | None = field(
        default=None, metadata={"help": "Use at most so many forget rows, drawn by the seed."}
    )
    measure_samples: int = field(default=500, metadata={"help": "Samples drawn before and after for the classifier."})

    def __post_init__(self):
        super().__post_init__()
        if self.measure_samples < 2:
            raise ValueError(f"measure_samples={self.measure_samples}: must be ≥ 2")
        if self.forget_limit is not None and self.forget_limit < 1:
            raise ValueError(f"forget_limit={self.forget_limit}: must be ≥ 1")
        for name in ("retain", "eval_split"):
            if getattr(self, name) and not self.dataset:
                raise ValueError(f"dataset: missing, which {name} needs; set it to 'digits', a folder, or an id")

    def _needs_forget_rows(self) -> bool:
        return False  # forget_prompts may stand in: the config knows

    def config(self, config_class: type, given: dict) -> VDUConfig:
        config = super().config(config_class, given)
        rows = any((self.forget_column, self.forget_ids, self.forget_dataset))
        if rows == bool(config.forget_prompts):
            raise ValueError(
                "forget_prompts: given beside rows to forget; keep one of them"
                if rows
                else "forget_column: missing; say what to forget by forget_column, forget_ids, forget_dataset or forget_prompts"
            )
        return config


def run_vdu(job: VDUJob, config: VDUConfig, trainer_class: type[VDUTrainer]) -> None:
    """Select, draw, train, draw again, save, and say where things are.

    Raises:
        ValueError: something in the recipe does not fit the model or the data; no model was written.
        FloatingPointError: the loss is not finite.
    """
    check_processes(config)
    parts = Parts(None, None, None, {}) if config.forget_prompts else select(job, config.id_column)
    classifier = None if job.classifier is None else _classifier(job.classifier)
    trainer = trainer_class(
        pipeline=_pipeline(job.model),
        args=config,
        forget_dataset=_limited(parts.forget, job.forget_limit, config.seed),
        retain_dataset=parts.retain,
        heldout_dataset=parts.heldout,
    )
    if job.dataset and not Path(job.dataset).exists():
        trainer.card_values = {"dataset_name": job.dataset, "dataset_type": job.dataset}
    # What cannot be measured is said now, and not after the training.
    reference = _reference(job, parts, trainer, classifier) if classifier else None
    before = trainer.draw(job.measure_samples, MEASURE_SEED) if classifier else None
    trainer.train(resume_from_checkpoint=resume_argument(config))
    after = trainer.draw(job.measure_samples, MEASURE_SEED) if classifier else None
    table = None
    if classifier and torch.isfinite(after).all():  # else it is destroyed, and there is nothing to count
        trainer.results, table = _figures(job, parts, classifier, reference, before, after)
    trainer.card_values = trainer.card_values | _picture(config)
    trainer.save_model()
    if trainer.is_world_process_zero():
        _report(trainer, table)


def _limited(rows: Dataset | None, limit: int | None, seed: int) -> Dataset | None:
    return (
        rows if rows is None or limit is None or limit >= len(rows) else rows.shuffle(seed=seed).select(range(limit))
    )


def _pipeline(model: str) -> str:
    return str(small_ddpm.cached(small_ddpm.NAMES[model])) if model in small_ddpm.NAMES else model


def _classifier(name: str) -> ClassifierFeatures:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    folder = str(cached_digits_classifier()) if name == "digits" else name
    try:
        model = AutoModelForImageClassification.from_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "").rstrip(".")
        raise ValueError(
            f"classifier={name!r}: neither a folder with a classifier and its image processor nor an id ({reason})"
        ) from error
    return ClassifierFeatures(model.eval(), processor, name=Path(folder).name)


def _figures(
    job: VDUJob,
    parts: Parts,
    classifier: ClassifierFeatures,
    reference: Features | None,
    before: Tensor,
    after: Tensor,
) -> tuple[list[Figure], Table]:
    classes = [classifier.classify(images) for images in (before, after)]
    forgotten = _forgotten_classes(parts)
    names = [str(value) for value in classifier.model.config.id2label.values()]
    figures = []
    if forgotten and any(int(value) in forgotten for value in classes[0]):
        unlearned = percentage_unlearned(*classes, forgotten)
        share = [100 * sum(int(value) in forgotten for value in drawn) / len(drawn) for drawn in classes]
        figures.append(
            Figure(
                metric="share", name="Samples of the forgotten kind", before=share[0], after=share[1], split="samples"
            )
        )
        figures.append(
            Figure(metric="pul", name="Percentage unlearned", before=0.0, after=unlearned.pul, split="samples")
        )
    if forgotten and all(any(int(value) not in forgotten for value in drawn) for drawn in classes):
        shift = class_shift(*classes, forgotten, len(names))
        figures.append(
            Figure(
                metric="total_variation",
                name="Change in the shares of the other classes",
                before=0.0,
                after=100 * shift.total_variation,
                split="samples",
            )
        )
    if reference is not None:
        distances = [
            frechet_distance(reference, features_of(images, classifier)).distance for images in (before, after)
        ]
        figures.append(
            Figure(
                metric="fid",
                name=f"Fréchet distance of {len(before):,} samples to {len(reference):,} other real images, features of "
                f"{classifier.name}",
                before=distances[0],
                after=distances[1],
                split=job.eval_split,
                unit="",
            )
        )
    table = Table(title=f"{job.measure_samples} samples from the same noise, as {classifier.name} sees them")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    for figure in figures:
        table.add_row(figure.name, *(f"{value:.2f} {figure.unit}".rstrip() for value in (figure.before, figure.after)))
    table.add_section()
    for index, name in enumerate(names):
        counts = (str(int((drawn == index).sum())) for drawn in classes)
        table.add_row(f"{name} (forgotten)" if index in forgotten else name, *counts)
    return figures, table


def _forgotten_classes(parts: Parts) -> list[int]:
    if parts.forget is None or data.label_column(parts.forget) is None:
        return []
    return sorted({label for label in data.labels_of(parts.forget) if isinstance(label, int)})


def _reference(job: VDUJob, parts: Parts, trainer: VDUTrainer, classifier: ClassifierFeatures) -> Features | None:
    """Of the real images that are not forgotten, at least two of them.

    Raises:
        ValueError: they do not fit the model, or the classifier has not the dataset's classes.
    """
    count, forgotten = classifier.model.config.num_labels, _forgotten_classes(parts)
    if forgotten and forgotten[-1] >= count:
        raise ValueError(
            f"classifier={job.classifier!r}: has {count} classes, so none is the dataset's {forgotten[-1]}"
        )
    rows = parts.evaluation.get("retain")
    if rows is None or len(rows) < 2:
        return None
    column = next(name for name in ("image", "pixel_values") if name in rows.column_names)
    images = [rows[index][column] for index in range(len(rows))]
    shape = resolution(trainer.pipeline)
    return features_of(pixels(images, shape, resize=trainer.args.resize, argument="eval_split"), classifier)


def _picture(config: VDUConfig) -> dict[str, str]:
    return {"picture": "pictures/after.png"} if config.grid_images else {}


def _report(trainer: VDUTrainer, table: Table | None) -> None:
    console, folder = Console(highlight=False, soft_wrap=True), trainer.args.output_dir
    if table is not None:
        console.print(table)
    for failed in trainer.failed_checks:
        console.print(f"[bold red]not passed[/]  {failed}")
    console.print(f"pipeline {folder}\ncard     {Path(folder, 'README.md')}")
    if trainer.args.grid_images:
        console.print(f"grids    {trainer.private_dir / 'samples'}")
    console.print(f"private  {trainer.private_dir} (could undo the unlearning: never publish it)\n\nLoad it:\n")
    code = trainer._card_defaults(folder)["load_snippet"]
    console.print("\n".join(f"    {line}".rstrip() for line in code.splitlines()), markup=False)
