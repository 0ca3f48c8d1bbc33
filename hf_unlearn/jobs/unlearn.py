"""The job of `hf-unlearn unlearn`: what a recipe's keys mean, and the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from transformers import AutoConfig

from ..files import loading
from ..hub.card import Figure
from ..hub.loading import loading_code
from ..training.checks import check_fields, check_is_not_original, check_processes
from ..unlearning.classifiers.pbu import PBUConfig, PBUTrainer
from ..unlearning.config import UnlearnConfig, UnlearnSFTConfig
from ..unlearning.trainer import UnlearnSFTTrainer, UnlearnTrainer
from .alone import made_once
from .keys import card_of_dataset, check_at_most_one, resume_argument, tell
from .selecting import select


if TYPE_CHECKING:
    from ..unlearning.config import UnlearnArguments


METHODS = {
    "pbu": (PBUConfig, PBUTrainer),
    "unlearn": (UnlearnConfig, UnlearnTrainer),
    "sft": (UnlearnSFTConfig, UnlearnSFTTrainer),
}


@dataclass
class UnlearnJob:
    """Which model forgets what: the keys of an unlearning recipe besides those of the method's config.

    Exactly one of `forget_column` (with `forget_values`), `forget_ids` and `forget_dataset` says what is forgotten.

    Args:
        method (`"pbu"` | `"unlearn"` | `"sft"`): trainer, and so the config that has the other keys.
        preset (`"paper"`, *optional*): with `method: pbu`, `vdu` or `adapt_then_unlearn`: the paper's settings; keys that are given win.
        model (`str`): `"digits"` (a small classifier of scikit-learn's digits, trained on first use), a folder, or an id.
        dataset (`str`, *optional*): `"digits"`, a folder, or an id: see [`hf_unlearn.examples.datasets.load`].
        dataset_revision (`str`, *optional*): of a dataset on the Hub.
        split (`str`, defaults to `"train"`): split that holds the forget examples.
        forget_column, forget_values (`str`, `list[str]`): forget the rows with one of these values in this column; class
            names and numbers are both understood.
        forget_ids (`list[str]`): forget the rows with these ids in `id_column`.
        forget_dataset (`str`): folder of a dataset saved with `save_to_disk`; `dataset` is optional then.
        retain (`bool`, defaults to `False`): hand over the other rows of the split too, as data to keep.
        heldout_split (`str`, *optional*): split that the model has never seen: the target of `forget: examples`.
        eval_split (`str`, *optional*): split to measure before and after, for the table and the card. Training never
            sees it.

    Raises:
        ValueError: a key that is missing, or two that exclude each other.
    """

    _argument_group_name = "model and data"
    _methods = METHODS

    method: Literal["pbu", "unlearn", "sft"] | None = None
    preset: Literal["paper"] | None = None
    model: str | None = None
    dataset: str | None = None
    dataset_revision: str | None = None
    split: str = "train"
    forget_column: str | None = None
    forget_values: list[str] | None = None
    forget_ids: list[str] | None = None
    forget_dataset: str | None = None
    retain: bool = False
    heldout_split: str | None = None
    eval_split: str | None = None

    def __post_init__(self):
        if self.method not in self._methods:
            raise ValueError(f"method: {self.method!r} is not one of {', '.join(self._methods)}")
        if self.preset is not None and not hasattr(self._methods[self.method][0], "paper"):
            raise ValueError(
                f"preset: method {self.method!r} has none, only pbu, vdu and adapt_then_unlearn do; leave it out"
            )
        if not self.model:
            raise ValueError("model: missing; set it to 'digits', a folder, or an id on the Hub")
        if self.forget_values and not self.forget_column:
            raise ValueError("forget_column: missing; name the column that holds forget_values, as in 'label'")
        if self.forget_column and not self.forget_values:
            raise ValueError("forget_values: missing; list the values of forget_column to forget, as in [3]")
        check_fields(self, {})
        chosen = check_at_most_one(self, ("forget_column", "forget_ids", "forget_dataset"))
        if not chosen:
            if not self._needs_forget_rows():
                return
            raise ValueError(
                "forget_column: missing; say what to forget by forget_column, forget_ids or forget_dataset"
            )
        if not self.dataset:
            needs = [name for name in ("retain", "heldout_split", "eval_split") if getattr(self, name)]
            if chosen != ["forget_dataset"] or needs:
                why = f", which {needs[0]} needs" if needs else ""
                raise ValueError(f"dataset: missing{why}; set it to 'digits', a folder, or an id on the Hub")

    def _needs_forget_rows(self) -> bool:
        return True

    def config(self, config_class: type, given: dict[str, Any]) -> UnlearnArguments:
        """The method's config with the keys that were given.

        Raises:
            ValueError: a key that is missing or a value that is not allowed.
        """
        if not given.get("output_dir"):
            raise ValueError("output_dir: missing; set it to the folder that gets the unlearned model")
        if self.forget_ids and "forget" not in given:
            raise ValueError(
                "forget: missing; say 'examples' to forget these rows, or 'class' to forget their classes"
            )
        check_is_not_original(given["output_dir"], self.model)
        return (config_class if self.preset is None else config_class.paper)(**given)


# Running


def run_unlearn(job: UnlearnJob, config: UnlearnArguments, trainer_class: type[UnlearnTrainer]) -> None:
    """Select, train, measure, save, and say where things are.

    Raises:
        ValueError: something in the recipe does not fit the model or the data; nothing was written.
        FloatingPointError: the loss is not finite.
    """
    check_processes(config)
    parts = select(job, config.id_column)
    trainer = trainer_class(
        _model(job, config),
        config,
        forget_dataset=parts.forget,
        retain_dataset=parts.retain,
        heldout_dataset=parts.heldout,
        # Not under the name "retain", which the guard would choose the best state by: these rows are for measuring.
        eval_dataset={f"{job.eval_split}_{name}": rows for name, rows in parts.evaluation.items()} or None,
    )
    trainer.card_values = card_of_dataset(job.dataset)
    before = _measure(trainer)
    trainer.train(resume_from_checkpoint=resume_argument(config))
    trainer.results = _figures(job, config, trainer, before, _measure(trainer))
    trainer.save_model()
    if trainer.is_world_process_zero():
        code = loading_code(type(trainer.model), config.output_dir, processor=trainer.processor_loader)
        tell(trainer, _table(trainer, len(parts.forget)), code, kind="model")


def _model(job: UnlearnJob, config: UnlearnArguments) -> str:
    if job.model == "digits":
        return made_once(config, "digits")
    with loading("model", job.model, "a model"):
        AutoConfig.from_pretrained(job.model)
    return job.model


def _measure(trainer: UnlearnTrainer) -> dict[str, float]:
    """Accuracy in %, or the loss of a language model in nats, on each evaluation set."""
    values = {}
    for name, rows in (trainer.eval_dataset or {}).items():
        if trainer.is_classifier:
            values[name] = 100 * trainer.predict(rows, metric_key_prefix="eval").metrics["eval_accuracy"]
        else:
            values[name] = trainer.evaluate(rows, metric_key_prefix=f"eval_{name}")[f"eval_{name}_loss"]
    return values


def _figures(
    job: UnlearnJob,
    config: UnlearnArguments,
    trainer: UnlearnTrainer,
    before: dict[str, float],
    after: dict[str, float],
) -> list[Figure]:
    what, metric, unit = ("Accuracy", "accuracy", "%") if trainer.is_classifier else ("Loss", "loss", "nats")
    is_class = config.forget == "class" and trainer.is_classifier
    asked = [name for name in after if is_class and name.endswith("_forget")]
    if config.forget == "class":
        forgotten, kept = "forgotten class" + "es" * (len(trainer.forgotten_classes) > 1), "other classes"
    else:
        forgotten, kept = "forgotten examples", "other examples"
    return [
        Figure(
            metric=metric,
            name=f"{what} on the {forgotten if name.endswith('_forget') else kept}",
            before=before[name],
            after=value,
            split=job.eval_split if job.forget_column or name.endswith("_retain") else job.split,
            unit=unit,
            target=_most(config.forget_accuracy, len(trainer.eval_dataset[name])) if name in asked else None,
        )
        for name, value in after.items()
        if math.isfinite(value) and math.isfinite(before[name])
    ]


def _most(accuracy: float, count: int) -> float:
    """In %: what so many examples may show of a class whose accuracy is no higher, by two standard errors."""
    return min(100.0, 100 * (accuracy + 2 * math.sqrt(accuracy * (1 - accuracy) / count)))


def _table(trainer: UnlearnTrainer, forgotten: int) -> Table | None:
    if not trainer.results:
        return None
    table = Table(title=f"{forgotten:,} forget examples, {trainer.provenance().steps:,} steps")
    table.add_column("")
    for heading in ("split", "before", "after"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for figure in trainer.results:
        values = (f"{value:.2f} {figure.unit}" for value in (figure.before, figure.after))
        table.add_row(figure.name, figure.split, *values)
    return table
