"""The job of `hf-unlearn unlearn --method vdu`: a diffusion pipeline forgets, and a classifier counts before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import data
from ..examples.named import DDPMS, TEXT_TO_IMAGE
from ..metrics.features import ClassifierFeatures
from ..training.checks import check_processes
from ..unlearning.diffusion.denoiser import resolution
from ..unlearning.diffusion.vdu import VDUConfig, VDUTrainer
from .alone import made_once
from .judging import Judge, classifier_of, forget_and_report, reference_of
from .selecting import Parts, select


if TYPE_CHECKING:
    from datasets import Dataset

    from .recipe.vdu import VDUJob


def run_vdu(job: VDUJob, config: VDUConfig, trainer_class: type[VDUTrainer]) -> dict[str, Any] | None:
    """Select, draw, train, draw again, save, and say where things are.

    Raises:
        ValueError: something in the recipe does not fit the model or the data; no model was written.
        FloatingPointError: the loss is not finite.
    """
    check_processes(config)
    parts = select(job, config.id_column) if job.names_rows else Parts()
    classifier = None if job.classifier is None else classifier_of(job.classifier, config)
    trainer = trainer_class(
        pipeline=_pipeline(job.model, config),
        args=config,
        forget_dataset=_limited(parts.forget, job.forget_limit, config.seed),
        retain_dataset=parts.retain,
        heldout_dataset=parts.heldout,
    )
    trainer.card_values = parts.card_values
    # What cannot be measured is said now, and not after the training.
    return forget_and_report(trainer, _judge(parts, trainer, classifier, job.measure_samples) if classifier else None)


def _limited(rows: Dataset | None, limit: int | None, seed: int) -> Dataset | None:
    return (
        rows if rows is None or limit is None or limit >= len(rows) else rows.shuffle(seed=seed).select(range(limit))
    )


def _pipeline(model: str, config: VDUConfig) -> str:
    return made_once(config, model) if model in (*DDPMS, *TEXT_TO_IMAGE) else model


def _judge(parts: Parts, trainer: VDUTrainer, classifier: ClassifierFeatures, samples: int) -> Judge:
    """Compares with the real images that are not forgotten, where there are some.

    Raises:
        ValueError: they do not fit the model, or the classifier has not the dataset's classes.
    """
    count, forgotten = classifier.model.config.num_labels, _forgotten_classes(parts)
    if forgotten and forgotten[-1] >= count:
        raise ValueError(
            f"classifier={classifier.name!r}: has {count} classes, so none is the dataset's {forgotten[-1]}"
        )
    others = parts.evaluation.get("retain")
    reference = reference_of(others, classifier, resolution(trainer.pipeline), resize=trainer.args.resize, each=False)
    return Judge(classifier, samples, forgotten, reference, parts.splits.get("retain"))


def _forgotten_classes(parts: Parts) -> list[int]:
    if parts.forget is None or data.label_column(parts.forget) is None:
        return []
    return sorted({label for label in data.labels_of(parts.forget) if isinstance(label, int)})
