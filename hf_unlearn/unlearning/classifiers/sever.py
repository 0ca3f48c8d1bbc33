"""Sever: a class goes from what the head is given, and its row of the head is closed in the end. The default for forgetting a class.

DELETE's loss ([`~hf_unlearn.unlearning.forget_loss.Redirect`]) takes a class from a classifier's answers, and an audit brings it back: features still tell
it from others, and as few steps move the weights little, twenty on the other classes alone undo them. Two things are ours:

1. **The features no longer point at the class.** Of features h = h_θ(x), the score of the label in the original's head is s = u·h with
   u = w*_y − mean of w*, and s̄ its mean over the forget examples in the original. In a net that was trained to the end the class means are the
   vertices of a simplex (neural collapse, arXiv 2008.08186): those of other classes score −s̄/(K−1). So that is where they are sent, by

       WEIGHT · (s + s̄/(K−1))².

2. **The row is closed.** A model that never saw the class has nothing to go back to: all that training ever did to its row was to lower it. In the state
   that is kept the row becomes the mean of the other rows, lowered by a gap: z_f(x) = mean of z_k(x) over kept k, minus the gap. So the class is never
   the answer, and what is trained on others lowers it further. Alone it would be a mask, which an audit calls *suppressed*; POUR (arXiv 2511.19339)
   leaves the row with nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...parameters.reference import trainable_parameters
from ...parameters.sharding import let_go, own, sharded_like, whole
from ...training.models import head_of
from ..forget_loss import Redirect


logger = logging.getLogger(__name__)

WEIGHT = 0.3  # of the first, a nat², chosen by benchmarks/sever_choice.py
ALIKE = 0.01  # of the size of logits: how near to them what the head gives must be


def severed(features: Tensor, directions: Tensor, score: float, classes: int) -> Tensor:
    r"""How far features are from where those of other classes are: $\big(u \cdot h + \tfrac{\bar s}{K-1}\big)^2$.

    Args:
        features (`Tensor`): h, `[batch, width]`.
        directions (`Tensor`): u of each label, `[batch, width]`.
        score (`float`): s̄, what u·h is on average in the original, nats.
        classes (`int`): K.

    Returns:
        `Tensor`: `[batch]`, nats².
    """
    return ((features.float() * directions).sum(-1) + score / (classes - 1)).square()


@torch.no_grad()
def close_rows(head: nn.Linear, forgotten: Sequence[int], gap: float) -> None:
    """Make rows of a head the mean of the others, lowered; in place.

    Args:
        head (`nn.Linear`): with a bias and a row for each class.
        forgotten (`list[int]`): rows to close; at least one other remains.
        gap (`float`): nats below the mean of the other logits.
    """
    closed = torch.zeros(head.out_features, dtype=torch.bool)
    closed[[*forgotten]] = True
    for parameter, lower in ((head.weight, 0.0), (head.bias, gap)):
        value = whole(parameter).clone()
        value[closed] = (value[~closed].float().mean(0) - lower).to(value.dtype)
        own(parameter).copy_(own(sharded_like(value, parameter)))


def trained_head(model: nn.Module) -> nn.Linear | None:
    """The linear layer that gives a classifier's logits, if it has one with a bias and both are trained."""
    try:
        head = head_of(model)
    except ValueError:
        return None
    trained = {id(parameter) for parameter in trainable_parameters(model).values()}
    return head if head.bias is not None and {id(head.weight), id(head.bias)} <= trained else None


def cannot_sever(model: nn.Module, args: Any) -> str | None:
    """Why a class cannot be severed in this model with these settings, as an error says it; None where it can."""
    if args.torch_compile:
        return "torch_compile=True: forget_loss='sever' reads features by hooks, which a compiled model skips; use 'redirect'"
    if trained_head(model) is None:
        return "forget_loss='sever': the model has no linear head with a bias that is trained; use 'redirect'"
    return None


@contextmanager
def given_to(head: nn.Module) -> Iterator[list[Tensor]]:
    """What a layer is given within, one tensor a forward pass."""
    given: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    try:
        yield given
    finally:
        handle.remove()


class Sever(Redirect):
    """DELETE's loss, and a class that the features no longer point at; in the end its row of the head is closed.

    Attributes:
        gap (`float`, *optional*): nats that closed rows lie below the mean of the others; None where none is closed.
    """

    name = "sever"

    def __init__(self, trainer: Any):
        super().__init__(trainer)
        self.gap: float | None = None
        self.head: nn.Linear | None = None
        self.score = 0.0  # s̄, not a number where features have no say
        self.directions: Tensor | None = None

    def check(self) -> None:
        trainer = self.trainer
        if not trainer.is_classifier or self.args.forget != "class":
            raise ValueError("forget_loss='sever': takes a class from a classifier; use 'redirect', or leave it out")
        if reason := cannot_sever(self._model, self.args):
            raise ValueError(reason)

    @property
    def _model(self) -> nn.Module:
        return self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)

    # While it is trained

    def begin(self, state: Any = None) -> None:
        trainer = self.trainer
        self.head = head = trained_head(self._model)
        weight, bias = (self._was(parameter) for parameter in (head.weight, head.bias))
        self.directions = (weight - weight.mean(0)).to(self.args.device)

        def look(batch: Any) -> Tensor:
            """The score of each label, `[batch]`; not a number where what the head gives is not the logits."""
            with given_to(head) as given:
                logits, labels = trainer.predictions(trainer.reference_forward, batch)
            h = given[0].float()
            if h.dim() != 2 or (F.linear(h, weight, bias) - logits).abs().max() > ALIKE * logits.abs().max():
                return torch.full(labels.shape, torch.nan, device=labels.device)
            return (h * self.directions[labels]).sum(-1)

        self.score = trainer.mean_of(look, trainer.forget_dataset)
        if not self.reads_features:
            logger.warning(
                "the last linear layer does not give the model's logits: forget_loss='redirect' is what is done, and training on other classes may "
                "bring back what is forgotten"
            )

    @property
    def reads_features(self) -> bool:
        return not math.isnan(self.score)

    def _was(self, parameter: nn.Parameter) -> Tensor:
        """A parameter of the head in the original, whole, in fp32."""
        named = trainable_parameters(self.trainer.model)
        name = next(name for name, one in named.items() if one is parameter)
        return whole(self.trainer.reference.parameters[name]).float().to(self.args.device)

    def means(self, model: Callable, batch: Any) -> Tensor:
        with given_to(self.head) as given:
            loss = super().means(model, batch)
        if not self.reads_features:
            return loss
        labels = self.trainer.labels_of(batch)
        return loss + WEIGHT * severed(given[0], self.directions[labels], self.score, len(self.directions))

    # In the end

    def ended(self) -> None:
        """Close the rows of what the original knew and the state that is kept has forgotten: a row that is closed over a class which is known would
        hide it.

        The gap gives the label of a forget example the lower of two means of log-odds: those that the original finds itself wrong, so little as
        training leaves for what it lowers, and those of the least likely class that is kept.
        """
        trainer, self.gap = self.trainer, None
        forwards = (trainer.reference_forward, trainer.model)
        asked = (lambda batch, forward=forward: trainer.correct(forward, batch) for forward in forwards)
        before, now = (
            trainer.above_target(known=known) for known in trainer._means(tuple(asked), trainer.forget_dataset)
        )
        if not self.reads_features or before <= 0 or now > 0:
            return
        mean, *levels = trainer._means((self._mean_kept, self._least_kept, self._found_wrong), trainer.forget_dataset)
        let_go(trainer.model)
        self.gap = mean - min(levels)
        close_rows(self.head, trainer.forgotten_classes, self.gap)

    def told(self) -> str | None:
        return (
            None if self.gap is None else f"its row of the head is the mean of the others', {self.gap:.3g} nats lower"
        )

    def chosen(self) -> dict[str, Any]:
        if not self.reads_features:
            return super().chosen() | {"forget_loss": "redirect"}  # which is what was done
        closed = {} if self.gap is None else {"closed_rows": f"the mean of the others, {self.gap:.3g} nats lower"}
        return super().chosen() | {"feature_weight": WEIGHT} | closed

    # Log-odds of a batch, `[batch]`, nats

    def _odds(self, forward: Callable, batch: Any) -> tuple[Tensor, Tensor]:
        """Those of the kept classes `[batch, kept]` and of all `[batch, classes]`, to all that are kept."""
        logits, labels = self.trainer.predictions(forward, batch)
        kept = ~self.trainer.family.excluded(logits, labels)
        odds = logits.float() - logits[:, kept].float().logsumexp(-1, keepdim=True)
        return odds[:, kept], odds

    def _mean_kept(self, batch: Any) -> Tensor:
        return self._odds(self.trainer.model, batch)[0].mean(-1)

    def _least_kept(self, batch: Any) -> Tensor:
        return self._odds(self.trainer.model, batch)[0].amin(-1)

    def _found_wrong(self, batch: Any) -> Tensor:
        """log Σ p* over the kept classes."""
        return -self._odds(self.trainer.reference_forward, batch)[1].logsumexp(-1)
