"""Losses by example, in nats."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


IGNORED = -100  # targets that do not count, as everywhere in PyTorch and Transformers


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of each example's predictions, in nats.

    Args:
        logits (`Tensor`): `[batch, …, classes]`; computed in fp32.
        targets (`Tensor`): `[batch, …]`, −100 where a prediction does not count.

    Returns:
        `Tensor`: `[batch]`; 0 for an example without predictions.
    """
    losses = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none", ignore_index=IGNORED)
    return mean_over_predictions(losses.view(targets.shape), targets)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of each example's numbers: `[batch, numbers]` and `[batch, numbers]`, or `[batch]` of one number; `[batch]`."""
    return (outputs.float().flatten(1) - targets.float().reshape(len(outputs), -1)).square().mean(1)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of each example's labels, any number of which may hold: `[batch, labels]` each, `[batch]`; in nats."""
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").mean(1)


def next_tokens(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What a causal language model predicts, and what comes: `[batch, length − 1, vocabulary]` and `[batch, length − 1]`.

    Aligned by the last tokens: with prompt tuning the logits begin with those of the virtual tokens, which answer to nothing.
    """
    length = tokens.shape[1]
    return logits[:, -length:][:, :-1], tokens[:, 1:]


def mean_over_predictions(values: Tensor, targets: Tensor) -> Tensor:
    """Mean of `values` over the predictions of each example that count: `[batch, …] -> [batch]`."""
    counted = (targets != IGNORED).flatten(1) if targets.dim() > 1 else (targets != IGNORED).unsqueeze(1)
    values = values.reshape(counted.shape)
    return values.masked_fill(~counted, 0).sum(1) / counted.sum(1).clamp(min=1)


def mean_of_counted(values: Tensor, targets: Tensor) -> Tensor:
    """As [`mean_over_predictions`] of values that are only there where a prediction counts, `[predictions]`, example after example."""
    counted = targets != IGNORED
    return mean_over_predictions(values.new_zeros(targets.shape).masked_scatter(counted, values), targets)
