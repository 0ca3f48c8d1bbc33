"""The job of `hf-unlearn unlearn` for classifiers, and what language models have of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.table import Table
from transformers import AutoConfig

from ..examples.named import LANGUAGE
from ..files import loading
from ..hub.card import Figure
from ..training.checks import check_processes
from .alone import made_once
from .keys import run_training, tell
from .selecting import Parts, select


if TYPE_CHECKING:
    from ..unlearning.config import UnlearnArguments
    from ..unlearning.trainer import UnlearnTrainer
    from .recipe.unlearn import UnlearnJob


def run_unlearn(
    job: UnlearnJob, config: UnlearnArguments, trainer_class: type[UnlearnTrainer]
) -> dict[str, Any] | None:
    """Select, train, measure, save, and say where things are.

    Raises:
        ValueError: something in the recipe does not fit the model or the data; nothing was written.
        FloatingPointError: the loss is not finite.
    """
    check_processes(config)
    parts = select(job, config.id_column)
    trainer = trainer_of(job, config, trainer_class, parts)
    return forget_and_tell(trainer, len(parts.forget), _measure, _figures)


def trainer_of(
    job: UnlearnJob, config: UnlearnArguments, trainer_class: type[UnlearnTrainer], parts: Parts, **others: Any
) -> UnlearnTrainer:
    """The trainer that a recipe asks for, of the rows that it selects; `others` are more of its arguments."""
    trainer = trainer_class(
        _model(job.model, config),
        config,
        forget_dataset=parts.forget,
        retain_dataset=parts.retain,
        heldout_dataset=parts.heldout,
        # Not under the name "retain", which the guard would choose the best state by: these rows are for measuring.
        eval_dataset={f"{parts.splits[name]}_{name}": rows for name, rows in parts.evaluation.items()} or None,
        **others,
    )
    trainer.card_values = parts.card_values
    return trainer


def forget_and_tell(
    trainer: UnlearnTrainer,
    forgotten: int,
    measure: Callable[[UnlearnTrainer], Any],
    figures: Callable[[UnlearnTrainer, Any, Any], list[Figure]],
) -> dict[str, Any] | None:
    """Measure, train, measure again, save, and say where things are; the first process returns what it said.

    Args:
        forgotten (`int`): number of examples to forget.
        measure (callable): looks at the trainer's model as it is.
        figures (callable): of the trainer and what was measured before and after.
    """
    before = measure(trainer)
    run_training(trainer)
    trainer.results = figures(trainer, before, measure(trainer))
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return None
    code = trainer.loading_code(trainer.args.output_dir)
    return tell(trainer, _table(trainer, forgotten), code, kind="model")


def _model(name: str, config: UnlearnArguments) -> str:
    if name in ("digits", *LANGUAGE):
        return made_once(config, name)
    with loading("model", name, "a model"):
        AutoConfig.from_pretrained(name)
    return name


def _measure(trainer: UnlearnTrainer) -> dict[str, float]:
    """Accuracy in %, or the loss of a language model in nats, on each evaluation set."""
    values = {}
    for name, rows in (trainer.eval_dataset or {}).items():
        if trainer.is_classifier:
            values[name] = 100 * trainer.predict(rows, metric_key_prefix="eval").metrics["eval_accuracy"]
        else:
            values[name] = trainer.evaluate(rows, metric_key_prefix=f"eval_{name}")[f"eval_{name}_loss"]
    return values


def _figures(trainer: UnlearnTrainer, before: dict[str, float], after: dict[str, float]) -> list[Figure]:
    what, metric, unit = ("Accuracy", "accuracy", "%") if trainer.is_classifier else ("Loss", "loss", "nats")
    is_class = trainer.args.forget == "class" and trainer.is_classifier
    asked = [name for name in after if is_class and name.endswith("_forget")]
    if trainer.args.forget == "class":
        forgotten, kept = "forgotten class" + "es" * (len(trainer.forgotten_classes) > 1), "other classes"
    else:
        forgotten, kept = "forgotten examples", "other examples"
    return [
        Figure(
            metric=metric,
            name=f"{what} on the {forgotten if name.endswith('_forget') else kept}",
            before=before[name],
            after=value,
            split=name.rpartition("_")[0],
            unit=unit,
            target=_most(trainer.args.forget_accuracy, len(trainer.eval_dataset[name])) if name in asked else None,
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
    compared = any(figure.retrained is not None for figure in trainer.results)
    for heading in ("", "split", "before", "after", *["retrained"] * compared):
        table.add_column(heading, justify="left" if heading in ("", "split") else "right")
    for figure in trainer.results:
        values = (figure.before, figure.after, *[figure.retrained] * compared)
        cells = (
            "–" if value is None else f"{value:{'.2f' if figure.unit else '.4g'}} {figure.unit}" for value in values
        )
        table.add_row(figure.name, figure.split, *(cell.rstrip() for cell in cells))
    return table
