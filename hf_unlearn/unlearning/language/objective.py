"""What forgetting means for a causal language model: which loss by default, which token answers which, what replay compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...training.logits import logits_at
from ...training.losses import IGNORED, next_tokens
from ..losses import divergence


class LanguageObjective:
    """Of a model whose prediction at a token is of the next one.

    Args:
        args (`UnlearnArguments`): the run's settings.
    """

    def __init__(self, args):
        self.args = args

    def choose(self, has_target: bool, model: nn.Module) -> str:
        """Which loss `forget_loss="bounded"` means: `redirect`.

        Raises:
            ValueError: a class is to be forgotten, which a language model does not have.
        """
        if self.args.forget == "class":
            raise ValueError(
                "forget='class' needs a classifier; a language model forgets examples: use forget='examples'"
            )
        return "redirect"

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
