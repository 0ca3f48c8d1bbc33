"""The job of `hf-unlearn unlearn --method vdu`: a diffusion pipeline forgets, and a classifier counts before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .. import data
from ..examples.named import DDPMS
from ..metrics.features import ClassifierFeatures
from ..training.checks import check_fields, check_processes
from ..unlearning.diffusion.denoiser import resolution
from ..unlearning.diffusion.vdu import VDUConfig, VDUTrainer
from .alone import made_once
from .judging import Judge, classifier_of, forget_and_report, reference_of
from .keys import card_of_dataset, check_needs
from .selecting import Parts, select
from .unlearn import UnlearnJob


if TYPE_CHECKING:
    from datasets import Dataset


METHODS = {"vdu": (VDUConfig, VDUTrainer)}


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

    method: Literal["vdu"] | None = None
    classifier: str | None = None
    forget_limit: int | None = None
    measure_samples: int = 500

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, {"≥ 2": ("measure_samples",), "≥ 1": ("forget_limit",)})
        example = "'digits', a folder, or an id"
        check_needs(self, ("retain", "dataset", example), ("eval_split", "dataset", example))

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
    classifier = None if job.classifier is None else classifier_of(job.classifier, config)
    trainer = trainer_class(
        pipeline=_pipeline(job.model, config),
        args=config,
        forget_dataset=_limited(parts.forget, job.forget_limit, config.seed),
        retain_dataset=parts.retain,
        heldout_dataset=parts.heldout,
    )
    trainer.card_values = card_of_dataset(job.dataset)
    # What cannot be measured is said now, and not after the training.
    forget_and_report(trainer, _judge(job, parts, trainer, classifier) if classifier else None)


def _limited(rows: Dataset | None, limit: int | None, seed: int) -> Dataset | None:
    return (
        rows if rows is None or limit is None or limit >= len(rows) else rows.shuffle(seed=seed).select(range(limit))
    )


def _pipeline(model: str, config: VDUConfig) -> str:
    return made_once(config, model) if model in DDPMS else model


def _judge(job: VDUJob, parts: Parts, trainer: VDUTrainer, classifier: ClassifierFeatures) -> Judge:
    """Compares with the real images that are not forgotten, where there are some.

    Raises:
        ValueError: they do not fit the model, or the classifier has not the dataset's classes.
    """
    count, forgotten = classifier.model.config.num_labels, _forgotten_classes(parts)
    if forgotten and forgotten[-1] >= count:
        raise ValueError(
            f"classifier={job.classifier!r}: has {count} classes, so none is the dataset's {forgotten[-1]}"
        )
    others = parts.evaluation.get("retain")
    reference = reference_of(others, classifier, resolution(trainer.pipeline), resize=trainer.args.resize)
    return Judge(classifier, job.measure_samples, forgotten, reference, job.eval_split)


def _forgotten_classes(parts: Parts) -> list[int]:
    if parts.forget is None or data.label_column(parts.forget) is None:
        return []
    return sorted({label for label in data.labels_of(parts.forget) if isinstance(label, int)})
