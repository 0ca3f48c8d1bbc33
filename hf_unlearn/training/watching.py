"""A callback that logs what a language model still knows while it trains."""

from __future__ import annotations

from typing import Any, Literal

from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl

from .evaluation import LanguageEvaluation, compare
from .texts import as_prompt_completion


class ForgettingCallback(TrainerCallback):
    """Logs what a model knows of sets of rows: before the first step, on the way, and of the model as it is in the end.

    `trainer.add_callback(ForgettingCallback(trainer, forget=rows))`; figures are logged as `eval_forget_probability` and the like, names
    as of [`LanguageScores.summary`] and [`~hf_unlearn.training.evaluation.compare`]. Looking changes no training: no weight, no random
    state.

    Args:
        trainer (`SFTTrainer` | `UnlearnSFTTrainer`): what it is added to, whose tokenizer reads the rows.
        forget, retain, heldout (`Dataset`, *optional*): rows that are forgotten, kept, and were never seen, as
            [`LanguageEvaluation`] takes them.
        every (`"epoch"` | `int`, defaults to `"epoch"`): how often; a number is of optimiser steps, ≥ 1.
        settings: others of [`LanguageEvaluation`], as in `max_new_tokens=0`.

    Raises:
        ValueError: no rows at all, rows that cannot be read, or another word or number.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        forget: Dataset | None = None,
        retain: Dataset | None = None,
        heldout: Dataset | None = None,
        every: Literal["epoch"] | int = "epoch",
        **settings: Any,
    ):
        if every != "epoch" and not (type(every) is int and every >= 1):
            raise ValueError(f"every={every!r}: must be 'epoch' or a number of steps ≥ 1")
        given = {"forget": forget, "retain": retain, "heldout": heldout}
        given = {name: rows for name, rows in given.items() if rows is not None}
        if not given:
            raise ValueError("forget: missing; pass rows to look at, as forget, retain or heldout")
        self.trainer, self.every = trainer, every
        self.evaluations = {}
        for name, rows in given.items():
            if hasattr(trainer, "as_asked"):  # as it reads its own
                rows = trainer.as_asked(as_prompt_completion(rows, "text", name), name)
            try:
                self.evaluations[name] = LanguageEvaluation(rows, trainer.processing_class, **settings)
            except ValueError as error:
                raise ValueError(str(error).replace("rows", name, 1)) from error

    def on_train_begin(self, args, state, control, **kwargs):
        self._look(control)

    def on_step_end(self, args, state, control, **kwargs):
        due = float(state.epoch).is_integer() if self.every == "epoch" else state.global_step % self.every == 0
        if due and state.global_step < state.max_steps:
            self._look(control)

    def on_train_end(self, args, state, control, **kwargs):
        self._look(
            control
        )  # here and not at the last step: a guard, or load_best_model_at_end, may have gone back to another

    def _look(self, control: TrainerControl) -> None:
        scores = {name: evaluation(self.trainer.model) for name, evaluation in self.evaluations.items()}
        figures = {f"{name}_{key}": value for name, of in scores.items() for key, value in of.summary().items()}
        if "forget" in scores:
            kept = [scores[name] for name in ("retain",) if name in scores]
            figures |= compare(scores["forget"], heldout=scores.get("heldout"), kept=kept)
        # Not the trainer's own `log`: SFTTrainer's would hand out, and forget, what it has gathered since the last one. And the
        # trainer is to log its losses when it would have.
        due = control.should_log
        Trainer.log(self.trainer, {f"eval_{name}": value for name, value in figures.items()})
        control.should_log = due
