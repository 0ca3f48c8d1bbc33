"""What forgetting means for a classifier of images or texts: which loss, which classes, what replay compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..losses import divergence
from .sever import cannot_sever


class ClassifierObjective:
    """Of a model that gives one prediction an example.

    Args:
        args (`UnlearnArguments`): the run's settings.
        num_labels (`int`): classes of the model.
        forgotten_classes (`list[int]`): those that occur in the forget set.
    """

    def __init__(self, args, num_labels: int, forgotten_classes: Sequence[int]):
        self.args, self.num_labels, self.forgotten_classes = args, num_labels, forgotten_classes

    def choose(self, has_target: bool, model: nn.Module) -> str:
        """Which loss `forget_loss="bounded"` means: to forget a class, `sever` where the head is a linear layer that is trained and `redirect` where it
        is not; single examples look like unseen ones.

        Raises:
            ValueError: every class is to be forgotten, or what unseen examples look like is not known.
        """
        if self.args.forget == "class":
            if len(self.forgotten_classes) >= self.num_labels:
                raise ValueError(
                    "forget_dataset: holds every class of the model, so none is left; use forget='examples'"
                )
            return "redirect" if cannot_sever(model, self.args) else "sever"
        if not has_target and self.args.forget_loss == "bounded":
            raise ValueError(
                "heldout_dataset: missing; single examples are forgotten when their loss is that of unseen data: pass "
                "heldout_dataset= or heldout_loss="
            )
        return "match"

    def answers(self, forward: Callable, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[batch, classes]` and the targets `[batch]` that they answer."""
        return forward(**inputs).logits, labels

    def counts(self, labels: Tensor, mask: Tensor | None) -> Tensor:
        """Each example has one prediction, `[batch]`."""
        return torch.ones_like(labels)

    def excluded(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Which classes `redirect` takes away, bool `[classes]` or `[batch, classes]`: the forgotten ones, or each target."""
        excluded = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        if self.args.forget == "class":
            excluded[list(self.forgotten_classes)] = True
            return excluded
        return excluded.expand_as(logits).scatter(-1, targets.clamp(min=0).unsqueeze(-1), True)

    def replay_divergence(self, logits: Tensor, reference_logits: Tensor) -> Tensor:
        """Divergence from the original over the classes that are to be kept, `[batch]`, nats."""
        excluded = self.excluded(logits[0], logits.new_zeros(1).long()) if self.args.forget == "class" else None
        return divergence(logits, reference_logits, excluded)
