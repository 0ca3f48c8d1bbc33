"""The last act on a classifier that forgot a class: the head's row of that class says no more of an input than the others do together.

Unlearning takes few steps and moves the weights little; twenty steps on retained rows alone move them back, and the class with them. A model
that never saw the class has nothing to go back to: all training ever did to its row was to lower it. A *closed* row is one like that:
the mean of the rows of the kept classes, lowered by a gap,

    z_f(x) = mean over kept k of z_k(x) − gap,

so that the class is never the answer, and what is trained on the others lowers it further. Alone it would be a mask, which an audit calls
*suppressed*: what the features know of the class is for the steps before it to take. Kin: POUR (arXiv 2511.19339) leaves the row with nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...parameters.reference import trainable_parameters
from ...parameters.sharding import let_go, own, sharded_like, whole
from ...training.models import head_of


logger = logging.getLogger(__name__)

AS_MEANT = 0.1  # nats by which closed rows may be off, as in 16 bits they are


@torch.no_grad()
def close_rows(head: nn.Linear, forgotten: Sequence[int], gap: float) -> None:
    """Close rows of a head, in place.

    Args:
        head (`nn.Linear`): with a bias and a row for each class.
        forgotten (`list[int]`): rows to close; at least one other remains.
        gap (`float`): nats below the mean of the other logits.
    """
    rows = torch.eye(head.out_features, device=head.weight.device)
    rows[forgotten] = 1 / (head.out_features - len(forgotten))
    rows[forgotten, torch.tensor(forgotten)[:, None]] = 0
    lowered = torch.zeros(head.out_features, device=head.weight.device)
    lowered[forgotten] = gap
    weight, bias = rows @ whole(head.weight).float(), rows @ whole(head.bias).float() - lowered
    for parameter, value in ((head.weight, weight), (head.bias, bias)):
        own(parameter).copy_(own(sharded_like(value, parameter)))


class ClosingMixin:
    """Closes the rows of forgotten classes when a run of the default loss ends.

    Attributes:
        row_gap (`float`, *optional*): nats that closed rows lie below the mean of the others; None where none is closed.
    """

    row_gap: float | None = None

    def _after_steps(self) -> None:
        """Close the rows of the forgotten classes, if the state that is kept has forgotten them already: a row that is closed over a class
        which is known would hide it. Rows that are not trained, or do not give the logits, stay as they are.

        The gap gives the label of a forget example the lowest of three means of log-odds: those that the original finds itself wrong,
        so little as training leaves for what it lowers; those of the least likely class that is kept; and what the original gives it, of a
        model whose row was closed before.
        """
        self.row_gap = None
        if not (self.is_classifier and self.args.forget == "class" and self.args.forget_loss == "bounded"):
            return
        known = self.mean_of(lambda batch: self.correct(self.model, batch), self.forget_dataset)
        if self.above_target(known=known) > 0:
            return
        head = self._trained_head()
        if head is None:
            logger.warning(
                "the head has no trained linear layer with a bias: the rows of the forgotten classes stay, and training on other classes may bring them back"
            )
            return
        let_go(self.model)
        before = [own(parameter).detach().clone() for parameter in (head.weight, head.bias)]
        mean, *levels = self._means(
            (self._mean_kept, self._least_kept, self._found_wrong, self._given), self.forget_dataset
        )
        gap = mean - min(levels)
        close_rows(head, self.forgotten_classes, gap)
        off = self.mean_of(
            lambda batch: (self._odds(self.model, batch)[2] - self._mean_kept(batch) + gap).abs(), self.forget_dataset
        )
        if off < AS_MEANT:
            self.row_gap = gap
            return
        let_go(self.model)
        with torch.no_grad():
            for parameter, value in zip((head.weight, head.bias), before, strict=True):
                own(parameter).copy_(value)
        logger.warning(
            "the last linear layer of the model does not give its logits: the rows of the forgotten classes stay, and training on other classes may "
            "bring them back"
        )

    def _trained_head(self) -> nn.Linear | None:
        try:
            head = head_of(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        except ValueError:
            return None
        let_go(self.model)
        trained = {id(parameter) for parameter in trainable_parameters(self.model).values()}
        return head if head.bias is not None and {id(head.weight), id(head.bias)} <= trained else None

    # Of a batch, `[batch]`, nats

    def _odds(self, forward: Callable, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the kept classes `[batch, kept]`, all of them `[batch, classes]`, and those of the labels `[batch]`; the kept ones sum to 1
        as odds.
        """
        logits, labels = self.predictions(forward, batch)
        logits = logits.float()
        kept = ~self.family.excluded(logits, labels)
        logits = logits - logits[:, kept].logsumexp(-1, keepdim=True)
        return logits[:, kept], logits, logits.gather(-1, labels[:, None])[:, 0]

    def _mean_kept(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self._odds(self.model, batch)[0].mean(-1)

    def _least_kept(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self._odds(self.model, batch)[0].amin(-1)

    def _found_wrong(self, batch: Mapping[str, Tensor]) -> Tensor:
        """log Σ p* over the kept classes."""
        return -self._odds(self.reference_forward, batch)[1].logsumexp(-1)

    def _given(self, batch: Mapping[str, Tensor]) -> Tensor:
        """log p* of the labels."""
        _, logits, labels = self._odds(self.reference_forward, batch)
        return labels - logits.logsumexp(-1)
