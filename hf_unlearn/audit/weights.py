"""The weights of a model that is attacked: which there are, how large they are, and what is done to them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


MATRICES = nn.Linear | nn.modules.conv._ConvNd | Conv1D  # the last one is GPT-2's, with inputs first


def layers_of(model: nn.Module) -> Iterable[nn.Module]:
    """Those with a matrix of weights that inputs are multiplied with."""
    return [module for module in model.modules() if isinstance(module, MATRICES)]


def weights_of(model: nn.Module) -> Iterable[Tensor]:
    return (layer.weight for layer in layers_of(model))


def quantised(weight: Tensor, bits: int) -> Tensor:
    """The nearest of 2^bits − 1 levels, symmetric around 0, with a scale for each output (the first axis)."""
    largest = 2 ** (bits - 1) - 1
    scale = weight.abs().flatten(1).amax(1).clamp(min=torch.finfo(weight.dtype).tiny) / largest
    scale = scale.view(-1, *[1] * (weight.dim() - 1))
    return (weight / scale).round().clamp(-largest, largest) * scale


def prune_smallest(weights: Iterable[Tensor], share: float) -> None:
    """Sets a share of all weights together, those nearest to 0, to 0, in place."""
    weights = list(weights)
    sizes = torch.cat([weight.abs().flatten().float() for weight in weights])
    limit = sizes.kthvalue(max(1, round(share * len(sizes)))).values
    for weight in weights:
        weight.masked_fill_(weight.abs() <= limit, 0)


def size_of_weights(model: nn.Module) -> float:
    """Root mean square of all weights that are matrices: biases and scales are of another size."""
    weights = [p.detach().float() for p in model.parameters() if p.dim() > 1]
    return float(np.sqrt(sum(float(w.square().sum()) for w in weights) / sum(w.numel() for w in weights)))
