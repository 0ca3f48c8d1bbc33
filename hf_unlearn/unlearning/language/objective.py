"""What forgetting means for a causal language model: which loss, which token answers which, what replay compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...training.logits import logits_at
from ...training.losses import IGNORED, cross_entropy, mean_of_counted, next_tokens
from ..losses import divergence
from . import losses


TOKEN_LOSSES = ("simnpo", "undial", "wga", "satimp", "ceu", "pdu")
PAIRED_LOSSES = ("dpo", "idkdpo", "altpo")  # of an answer and the one that is wanted instead
ONLY_TEXTS = (*TOKEN_LOSSES, *PAIRED_LOSSES, "rmu")


def token_loss(name: str, logits: Tensor, targets: Tensor, reference_logits: Callable[[], Tensor]) -> Tensor:
    """One of [`TOKEN_LOSSES`], a mean over the tokens of each text that count, `[batch]`.

    Args:
        logits (`Tensor`): `[predictions, vocabulary]`, of the tokens that count, text after text.
        targets (`Tensor`): `[batch, tokens]`, −100 where none.
        reference_logits (callable): the original's; only `undial` asks for them.
    """
    counted = targets[targets != IGNORED]
    if name == "simnpo":
        return losses.simnpo(mean_of_counted(cross_entropy(logits, counted), targets))
    if name == "pdu":
        return mean_of_counted(losses.pdu(logits), targets)
    if name in ("undial", "ceu"):
        other = (reference_logits(),) if name == "undial" else ()
        return mean_of_counted(getattr(losses, name)(logits, *other, counted), targets)
    return mean_of_counted(getattr(losses, name)(cross_entropy(logits, counted)), targets)


class LanguageObjective:
    """Of a model whose prediction at a token is of the next one.

    Args:
        args (`UnlearnArguments`): the run's settings.
    """

    def __init__(self, args):
        self.args = args

    def choose(self, has_target: bool) -> str:
        """Which loss `forget_loss="bounded"` means: `redirect`.

        Raises:
            ValueError: a class is to be forgotten, which a language model does not have.
        """
        if self.args.forget == "class":
            raise ValueError(
                "forget='class' needs a classifier; a language model forgets examples: use forget='examples'"
            )
        return "redirect"

    def check(self, name: str, has_alternates: bool, retain_rows: Any) -> None:
        """Refuse what does not go with a forget loss.

        Args:
            name (`str`): of the loss.
            has_alternates (`bool`): the forget rows have answers that are wanted instead, or will have.
            retain_rows: what is to be kept, or None.

        Raises:
            ValueError: naming the setting or the dataset.
        """
        if name in ("match", "rmu") and self.args.loss_reduction != "example":
            raise ValueError(
                f"loss_reduction={self.args.loss_reduction!r}: forget_loss={name!r} takes means of texts; leave it out"
            )
        if name == "rmu" and self.args.retain_loss != "nll":
            raise ValueError(
                f"retain_loss={self.args.retain_loss!r}: forget_loss='rmu' compares hidden states instead; leave it out"
            )
        if name == "rmu" and self.args.torch_compile:
            raise ValueError(
                "torch_compile=True: forget_loss='rmu' reads hidden states by hooks, which a compiled model skips; set it to False"
            )
        if name == "pdu" and retain_rows is None:
            raise ValueError(
                "retain_dataset: missing, whose loss is the limit of forget_loss='pdu'; pass rows to keep"
            )
        if name in PAIRED_LOSSES and not has_alternates:
            raise ValueError(
                f"forget_dataset: has no column 'alternate', which forget_loss={name!r} needs; give the answers that are wanted "
                "instead there"
            )

    def answers(self, forward: Callable, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[batch, length − 1, vocabulary]` and the tokens `[batch, length − 1]` that they predict."""
        targets = self._targets(labels, inputs.get("attention_mask"))
        return next_tokens(forward(**inputs, use_cache=False).logits, labels)[0], targets

    def counted(
        self, forward: Callable, inputs: Mapping[str, Tensor], labels: Tensor, model: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """Logits `[predictions, vocabulary]` of the tokens that count alone, text after text, and the tokens `[batch, length − 1]`.

        Args:
            model (`nn.Module`): whose head `forward` uses.
        """
        targets = self._targets(labels, inputs.get("attention_mask"))
        places = F.pad(targets != IGNORED, (0, 1))
        return logits_at(forward, inputs, places, model=self._hooked(model)), targets

    def _hooked(self, model: nn.Module) -> nn.Module | None:
        return None if self.args.torch_compile else model

    def counts(self, labels: Tensor, mask: Tensor | None) -> Tensor:
        """How many tokens of each text are predicted and count, `[batch]`."""
        return (self._targets(labels, mask) != IGNORED).sum(1)

    def _targets(self, labels: Tensor, mask: Tensor | None) -> Tensor:
        # Padded on the left, the first token would be predicted from the padding.
        return labels[:, 1:] if mask is None else labels[:, 1:].masked_fill(mask[:, :-1] == 0, IGNORED)

    def excluded(self, logits: Tensor, targets: Tensor) -> Tensor:
        """What `redirect` takes away: each prediction's own token."""
        nothing = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device).expand_as(logits)
        return nothing.scatter(-1, targets.clamp(min=0).unsqueeze(-1), True)

    def replayed(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Labels `[batch, length]` that count where a token is, wherever the padding is: replay compares what is said there."""
        mask = batch.get("attention_mask")
        return torch.zeros_like(batch["input_ids"]) if mask is None else torch.where(mask.bool(), 0, IGNORED)

    def replay_divergence(self, logits: Tensor, reference_logits: Tensor) -> Tensor:
        """Divergence from the original at every prediction, nats."""
        return divergence(logits, reference_logits)
