"""A forget loss and what goes with it: the base of every one, and those that more than one family has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from ..training.losses import IGNORED, mean_of_counted
from . import losses


class ForgetLoss:
    """What is minimised on the forget rows, what on rows to keep, and what a run of it needs. One that is new is a subclass in a file of
    its own, and a line in [`~hf_unlearn.unlearning.objective.FORGET_LOSSES`].

    Attributes:
        name (`str`): `forget_loss=` of the config.
        credit (`dict[str, str]`): what it is, and the arXiv id of those who published it, for the card.
        settings (`tuple[str, ...]`): of the config, that some other losses do not read.
        of_texts (`bool`): for language models alone.
        paired (`bool`): reads answers that are wanted instead, the column `alternate`.
        replay_weight (`float`): of data-free replay, where none is given and there are no rows to keep.
        watches_kept (`bool`): looks at the loss of rows to keep, whatever it weighs.

    Args:
        trainer: the unlearning trainer, complete but for this.

    Raises:
        ValueError: the trainer's settings or data do not go with it; names them.
    """

    name: ClassVar[str]
    credit: ClassVar[dict[str, str]] = {}
    settings: ClassVar[tuple[str, ...]] = ("retain_loss",)
    of_texts: ClassVar[bool] = False
    paired: ClassVar[bool] = False
    replay_weight: ClassVar[float] = 5.0
    watches_kept: ClassVar[bool] = False

    def __init__(self, trainer: Any):
        self.trainer, self.args = trainer, trainer.args
        self.check()

    def check(self) -> None:
        """Refuse what does not go with it.

        Raises:
            ValueError: naming the setting or the dataset.
        """

    # The losses

    def means(self, model: Callable, batch: Any) -> Tensor:
        """The loss of each forget example, a mean over its predictions, `[batch]`; or a scalar."""
        raise NotImplementedError

    def retain_loss(self, model: Callable, batch: Any) -> Tensor:
        """The task's own loss on rows to keep, or the divergence from the original's answers, `[batch]`."""
        trainer = self.trainer
        if self.args.retain_loss == "nll":
            return trainer.by_token(trainer.task_loss(model, batch), batch)
        logits, targets = trainer.counted(model, batch)
        reference_logits, _ = trainer.counted(trainer.reference_forward, batch)
        return trainer.by_token(mean_of_counted(losses.divergence(logits, reference_logits), targets), batch)

    @property
    def retain_weight(self) -> float:
        return self.args.retain_weight

    # A run

    def begin(self, state: Any = None) -> None:
        """Before the first step.

        Args:
            state: what [`state`] of a run said that goes on, or None.
        """

    def saw(self, kept: Tensor) -> None:
        """Of each micro-batch, where it `watches_kept`: the loss of the rows to keep, a scalar."""

    def stepped(self) -> None:
        """After the last backward pass of each optimiser step."""

    def ended(self) -> None:
        """After the last step, on the state that is kept and before it is judged."""

    def told(self) -> str | None:
        """What was done in the end, for the line that a run ends with."""

    def state(self) -> Any:
        """What a run that goes on needs to know, as JSON has it."""

    def logged(self) -> dict[str, float]:
        """What is logged beside the terms of the loss."""
        return {}

    def chosen(self) -> dict[str, Any]:
        """`settings`, with what was chosen where nothing was given."""
        return {name: getattr(self.args, name) for name in self.settings}


class Ascent(ForgetLoss):
    """Gradient ascent."""

    name = "ascent"

    def means(self, model: Callable, batch: Any) -> Tensor:
        return losses.ascent(self.trainer.task_loss(model, batch))


class Match(ForgetLoss):
    """The mean loss becomes that of rows that were never seen."""

    name = "match"
    replay_weight = 0.1  # what is asked for is of single examples, which inputs made from them pull against

    def check(self) -> None:
        if self.trainer.heldout_dataset is None and self.args.heldout_loss is None:
            raise ValueError("forget_loss='match' needs a target: pass heldout_dataset= or heldout_loss=")
        check_takes_means(self)

    def means(self, model: Callable, batch: Any) -> Tensor:
        return losses.match(self.trainer.task_loss(model, batch), self.trainer.heldout_loss)


class Npo(ForgetLoss):
    """Negative preference optimisation."""

    name, credit = "npo", {"NPO's loss": "2404.05868"}
    settings = (*ForgetLoss.settings, "preference_beta")
    replay_weight = 1.0  # as for `match`

    def means(self, model: Callable, batch: Any) -> Tensor:
        nll, reference_nll, count = self.trainer.of_whole_texts(model, batch)
        return losses.npo(nll, reference_nll, self.args.preference_beta) / count


class Uniform(ForgetLoss):
    """Nothing is likelier than anything else."""

    name = "uniform"

    def means(self, model: Callable, batch: Any) -> Tensor:
        logits, targets = self.trainer.counted(model, batch)
        return mean_of_counted(losses.uniform(logits), targets)


class Redirect(ForgetLoss):
    """What the original would have said without the forgotten classes, or without the tokens of a text."""

    name, credit = "redirect", {"DELETE's loss": "2503.23751"}

    def means(self, model: Callable, batch: Any) -> Tensor:
        trainer = self.trainer
        logits, targets = trainer.counted(model, batch)
        reference_logits, _ = trainer.counted(trainer.reference_forward, batch)
        excluded = trainer.family.excluded(logits, targets[targets != IGNORED])
        return mean_of_counted(losses.redirect(logits, reference_logits, excluded), targets)


def check_takes_means(loss: ForgetLoss) -> None:
    """Refuse a `loss_reduction` for a loss that takes means of texts.

    Raises:
        ValueError: as said.
    """
    if loss.trainer.is_causal_lm and loss.args.loss_reduction != "example":
        raise ValueError(
            f"loss_reduction={loss.args.loss_reduction!r}: forget_loss={loss.name!r} takes means of texts; leave it out"
        )
