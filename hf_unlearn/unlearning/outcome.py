"""What became of what was to be forgotten, and of the rest: measured when a run ends, with or without a guard or a target."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..hub.card import Figure
from .guard import DEFAULT_TOLERANCE


NOTHING_TO_FORGET = {
    "class": "the model gives these examples other labels; compare the dataset's labels with model.config.id2label",
    "examples": "the loss on forget_dataset is that of unseen data already",
}


@dataclass(frozen=True)
class Outcome:
    """How a run came out.

    Attributes:
        now, original (`dict[str, float]`): figures of the kept state and of the original on the forget set; see
            [`~OutcomeMixin.forget_figures`].
        remembered (`float`): how far the kept state is from the forget target, as [`~hf_unlearn.unlearning.guard.Look`] has
            it; infinite where no target is known.
        utility (`float`, *optional*): of the original, in the unit of `utility_kind`; None where nothing to keep is known.
        utility_drop (`float`, *optional*): what was lost of it.
    """

    now: dict[str, float]
    original: dict[str, float]
    remembered: float
    utility: float | None = None
    utility_drop: float | None = None


class OutcomeMixin:
    """Judges an unlearning run at its end: a line for whoever watches, figures for the card, and what did not pass."""

    outcome: Outcome | None = None
    _divergence_unit = "nats"

    # Measured

    def forget_figures(self, model: Callable) -> dict[str, float]:
        """Of the forget set: `loss`, its mean in nats, and `known`, the share of examples that are answered right, of texts
        the share of which every token that counts is the likeliest one.
        """
        asked = (lambda batch: self.correct(model, batch), lambda batch: self.task_loss(model, batch))
        return dict(zip(("known", "loss"), self._means(asked, self.forget_dataset), strict=True))

    def judge(self) -> Outcome:
        """Compare the model as it is with the original."""
        now, original = self.forget_figures(self.model), self.forget_figures(self.reference_forward)
        best = self.guard.best if self.guard else None
        if best is not None:
            return Outcome(now, original, best.remembered, self.guard.state.baseline, best.utility_drop)
        remembered = self.above_target(**now)
        if not self.has_utility:
            return Outcome(now, original, remembered)
        utility = self.utility(self.reference_forward)
        return Outcome(now, original, remembered, utility, self.utility_drop(utility))

    # Said

    @property
    def outcome_line(self) -> str:
        """In one sentence: forgotten how far, utility lost, and what the guard kept."""
        parts = [self._forgotten_how_far(self.outcome)]
        if (utility := self._utility_figure) is None:
            parts.append("what was lost elsewhere is not known (guard=False, and no data to keep)")
        else:
            share = self.utility_kind == "accuracy"
            unit = "%" if share else f" {utility['unit']}".rstrip()
            before, after = (f"{utility[when]:.3g}{unit}" for when in ("before", "after"))
            tolerance = f"{100 * self.utility_tolerance:g} points" if share else f"{self.utility_tolerance:g}"
            parts.append(f"{utility['name'].lower()} {after} ({before} before, tolerance {tolerance})")
        if (told := self.forgetting.told()) is not None:
            parts.append(told)
        if self.guard:
            parts.append(f"kept is step {self._steps_taken:,}")
        return f"{type(self).__name__}, {self.state.global_step:,} steps: {'; '.join(parts)}"

    @property
    def _utility_figure(self) -> dict[str, Any] | None:
        outcome, kind = self.outcome, self.utility_kind
        if outcome.utility_drop is None:
            return None
        unit = {"accuracy": "%", "loss": "nats", "divergence": self._divergence_unit}[kind]
        scale, sign = (100, -1) if kind == "accuracy" else (1, 1)
        return {
            "metric": kind,
            "name": f"{kind.capitalize()} {'from the original ' if kind == 'divergence' else ''}on what is kept",
            "unit": unit,
            "before": scale * outcome.utility,
            "after": scale * (outcome.utility + sign * outcome.utility_drop),
        }

    def _forgotten_how_far(self, outcome: Outcome) -> str:
        now, original = outcome.now, outcome.original
        what = "forget examples" if self.is_classifier else "forget texts"
        known, loss = f"{100 * original['known']:.1f} % before", f"{original['loss']:.3g} before"
        if self.args.forget == "class":
            known += f", target {100 * self.args.forget_accuracy:.1f} %"
        elif self.heldout_loss is not None:
            loss += f", target {self.heldout_loss:.3g}"
        right = "right" if self.is_classifier else "word for word"
        return f"{100 * now['known']:.1f} % of the {what} are answered {right} ({known}), their loss is {now['loss']:.3g} nats ({loss})"

    @property
    def outcome_figures(self) -> list[Figure]:
        """What was measured when the run ended, for the card."""
        outcome = self.outcome
        if outcome is None:
            return []
        figures: list[dict[str, Any]] = [
            {"metric": metric, "name": name, "unit": unit, "before": scale * outcome.original[key], "after": scale * outcome.now[key]}
            for key, (metric, name, unit, scale) in self._figure_names.items() if key in outcome.original
        ]  # fmt: skip
        total, looked = len(self.forget_dataset), min(self.args.guard_examples, len(self.forget_dataset))
        split = "forget set" if looked == total else f"forget set, {looked:,} of {total:,}"
        figures = [figure | {"split": split} for figure in figures]
        if (utility := self._utility_figure) is not None:
            figures.append(utility | {"split": "kept"})
        finite = (figure for figure in figures if math.isfinite(figure["before"]) and math.isfinite(figure["after"]))
        return [Figure(**figure) for figure in finite]

    @property
    def _figure_names(self) -> dict[str, tuple[str, str, str, float]]:
        known = "Forget examples answered right" if self.is_classifier else "Forget texts known word for word"
        return {"known": ("accuracy", known, "%", 100), "loss": ("loss", "Loss on the forget set", "nats", 1)}

    @property
    def _target(self) -> str:
        """What counts as forgotten, where there is a target."""
        if self.args.forget == "class":
            return f"accuracy on the forget examples is at most {100 * self.args.forget_accuracy:g} %"
        return "the loss on the forget examples is that of data never seen"

    @property
    def nothing_to_forget(self) -> str:
        """What to say where the original meets the forget target already."""
        return NOTHING_TO_FORGET[self.args.forget]

    @property
    def _target_unit(self) -> str:
        return "accuracy on the forget set" if self.args.forget == "class" else "nats of loss"

    def _as_before(self, outcome: Outcome) -> str | None:
        """What to say where what was to be forgotten is as likely as before."""
        now, original = outcome.now, outcome.original
        if now["loss"] - original["loss"] <= DEFAULT_TOLERANCE["loss"]:  # what counts as no change where data are kept
            return f"a loss of {now['loss']:.3g} nats, {original['loss']:.3g} before"
        if not self.is_classifier and now["known"] > original["known"] / 2:
            return f"{100 * now['known']:.1f} % of the texts are known word for word, {100 * original['known']:.1f} % before"
        return None

    @property
    def failed_checks(self) -> list[str]:
        """What cannot be vouched for in the state that is kept, a line each, for the card."""
        outcome, guard = self.outcome, self.guard
        best = guard.best if guard else None
        if outcome is None:
            return []
        failed: list[str] = []
        if not all(map(math.isfinite, outcome.now.values())):
            failed.append("The model is destroyed: its loss on the forget set is not finite.")
        nothing = guard.looks[0].forgotten if best else self.above_target(**outcome.original) <= 0
        if nothing:
            failed.append(f"Nothing was there to forget before the first step: {self.nothing_to_forget}.")
        missed, unforgotten = [], outcome.remembered > 0
        if unforgotten and math.isfinite(outcome.remembered):
            missed.append(
                f"the forget target was not reached: {outcome.remembered:.3g} {self._target_unit} are missing"
            )
        if unforgotten and (as_before := self._as_before(outcome)):
            missed.append(f"what was to be forgotten is as likely as before: {as_before}")
        if missed:
            failed.append("; ".join(missed)[0].upper() + "; ".join(missed)[1:] + ".")
        later = guard.looks[1:] if best else []
        if best and best.step == 0 and later and not any(look.kept for look in later):
            nothing = "Nothing was unlearned" if self._begins_as_original else "Nothing more was unlearned by training"
            failed.append(f"{nothing}: every state after the first step lost more utility than the tolerance.")
        drop = outcome.utility_drop
        if drop is not None and not drop <= self.utility_tolerance:
            failed.append(f"Utility fell by {drop:.3g}, more than the tolerance of {self.utility_tolerance:g}.")
        return failed

    @property
    def passed_checks(self) -> list[str]:
        """What the guard saw to be as it should in the state that is kept, a line each, for the card."""
        best = self.guard.best if self.guard else None
        if best is None:
            return []
        passed = []
        if best.step and best.forgotten and not self.guard.looks[0].forgotten:
            passed.append(f"The forget target was reached: {self._target}.")
        if best.step and best.kept and math.isfinite(best.utility_drop):
            passed.append(f"Utility fell by no more than the tolerance of {self.utility_tolerance:g}.")
        return passed
