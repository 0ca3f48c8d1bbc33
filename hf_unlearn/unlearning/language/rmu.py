"""RMU: hidden states of what is to be forgotten are sent to a random vector (arXiv 2403.03218)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...training.logits import only_at
from ...training.losses import mean_over_predictions
from ..forget_loss import ForgetLoss, check_takes_means


BELOW = 2  # layers below the one that is looked at which are trained too


def rmu(hidden: Tensor, target: Tensor) -> Tensor:
    r"""Distance of hidden states from where they are to be: $\frac1d\lVert h - t \rVert^2$, with $t = c\,u$ for what is to be forgotten, and the
    original's own for what is to be kept.

    Args:
        hidden (`Tensor`): h, `[rows, tokens, size]`.
        target (`Tensor`): t, which broadcasts to it.

    Returns:
        `Tensor`: `[rows, tokens]`.
    """
    return (hidden.float() - target.float()).square().mean(-1)


class Rmu(ForgetLoss):
    """RMU's loss, on rows to keep too. Of the model only the layer that is looked at and the two below it stay trainable."""

    name, of_texts = "rmu", True
    credit = {"RMU's loss": "2403.03218"}
    settings = ("rmu_layer", "rmu_coefficient")

    def __init__(self, trainer: Any):
        super().__init__(trainer)
        self.layer = layer_of(trainer.model, self.args.rmu_layer)
        train_below(trainer.model, self.layer)

    def check(self) -> None:
        check_takes_means(self)
        if self.args.retain_loss != "nll":
            raise ValueError(
                f"retain_loss={self.args.retain_loss!r}: forget_loss='rmu' compares hidden states instead; leave it out"
            )
        if self.args.torch_compile:
            raise ValueError(
                "torch_compile=True: forget_loss='rmu' reads hidden states by hooks, which a compiled model skips; set it to False"
            )

    def means(self, model: Callable, batch: Any) -> Tensor:
        hidden = self._hidden(model, batch)
        noise = self.args.rmu_coefficient * direction(hidden.shape[-1], self.args.seed).to(hidden.device)
        return mean_over_predictions(rmu(hidden, noise), self.trainer.labels_of(batch))

    def retain_loss(self, model: Callable, batch: Any) -> Tensor:
        """The distance from the original's hidden states, `[batch]`."""
        hidden, kept = (self._hidden(forward, batch) for forward in (model, self.trainer.reference_forward))
        return mean_over_predictions(rmu(hidden, kept), self.trainer.labels_of(batch))

    def chosen(self) -> dict[str, Any]:
        return super().chosen() | {"rmu_layer": self.layer}

    def _hidden(self, forward: Callable, batch: Any) -> Tensor:
        layer = layers_of(self.trainer.model)[self.layer]
        hidden = hidden_states(forward, self.trainer.inputs_of(batch), layer, self.trainer.model)
        return hidden[:, -self.trainer.labels_of(batch).shape[1] :]  # behind the virtual tokens of prompt tuning


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a language model, also below an adapter.

    Raises:
        ValueError: they are not found.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    depth = model.config.get_text_config().num_hidden_layers
    for part in base.get_decoder().modules():
        if isinstance(part, nn.ModuleList) and len(part) == depth:
            return part
    raise ValueError(f"forget_loss='rmu': no list of {depth} layers is in {type(base).__name__}; use another loss")


def layer_of(model: PreTrainedModel, given: int | None) -> int:
    """The layer whose output is looked at. Default: 7 of 32 as in the paper, in proportion and rounded down.

    Raises:
        ValueError: the model has fewer layers.
    """
    depth = len(layers_of(model))
    if given is not None and given >= depth:
        raise ValueError(f"rmu_layer={given}: the model has {depth} layers; choose one of 0 to {depth - 1}")
    return 7 * depth // 32 if given is None else given


def train_below(model: PreTrainedModel, layer: int) -> None:
    """Of what is trainable, leave only what lies in this layer and the two below it.

    Raises:
        ValueError: nothing of that is trainable.
    """
    first = max(0, layer - BELOW)
    near = {id(parameter) for part in layers_of(model)[first : layer + 1] for parameter in part.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not any(id(parameter) in near for parameter in trained):
        raise ValueError(f"rmu_layer={layer}: nothing in layers {first} to {layer} is trainable; choose another")
    for parameter in trained:
        parameter.requires_grad_(id(parameter) in near)


def direction(size: int, seed: int) -> Tensor:
    """u: a unit vector, drawn by the seed from those with positive entries as in the paper, `[size]`."""
    drawn = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


def hidden_states(forward: Callable, inputs: Mapping[str, Tensor], layer: nn.Module, model: PreTrainedModel) -> Tensor:
    """What a layer of the model puts out while it runs, without logits, `[batch, tokens, size]`."""
    seen = []
    hook = layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    try:
        with only_at(model, torch.zeros_like(inputs["input_ids"], dtype=torch.bool)):
            forward(**inputs, use_cache=False)
    finally:
        hook.remove()
    return seen[0]
