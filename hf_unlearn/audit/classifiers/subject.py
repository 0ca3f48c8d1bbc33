"""A classifier that is audited: what it answers, and what it knows at each depth. Every look is taken once."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...modes import looking
from ...training.losses import cross_entropy
from ...training.models import head_of
from ..audited import AuditedModel
from .data import BATCH, ClassifierData, Part


@dataclass(frozen=True)
class Look:
    """What a classifier says of the rows of a part.

    Attributes:
        logits (`Tensor`): `[n, classes]`, fp32, on the CPU.
        features (`list[Tensor]`): `[n, width]` each, by depth: hidden states averaged over places, and last what the head is given.
        labels (`Tensor`): `[n]`.
    """

    logits: Tensor
    features: list[Tensor]
    labels: Tensor

    @property
    def right(self) -> Tensor:
        return (self.logits.argmax(-1) == self.labels).double()

    @property
    def probabilities(self) -> Tensor:
        return self.logits.double().softmax(-1)

    @property
    def losses(self) -> Tensor:
        return cross_entropy(self.logits, self.labels).double()


class ClassifierSubject(AuditedModel):
    """A classifier of Transformers."""

    def copy(self) -> nn.Module:
        """A model of its own to attack, in eval mode and fp32, of which every weight may be trained: in 16 bits small steps are lost."""
        attacked = copy.deepcopy(self.model).eval().float()
        return attacked.requires_grad_(True)

    def look(self, part: Part) -> Look:
        return self.once(part, lambda: look_at(self.model, part))


def look_at(model: nn.Module, part: Part, *, features: bool = True) -> Look:
    """Logits and, unless they are not wanted, features of a model on a part; the model stays as it is.

    Raises:
        ValueError: logits that are not finite.
    """
    logits, depths = [], []
    head, given = head_of(model), []
    handle = head.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    wanted = {"output_hidden_states": True} if features and isinstance(model, PreTrainedModel) else {}
    try:
        with looking(model) as device:
            dtype = next(model.parameters()).dtype
            for inputs, _ in part.batches(device):
                inputs = {
                    name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()
                }
                given.clear()
                output = model(**inputs, **wanted)
                logits.append(output.logits.float().cpu())
                if features:
                    hidden = [
                        pooled(state, inputs.get("attention_mask"))
                        for state in getattr(output, "hidden_states", None) or ()
                    ]
                    depths.append([state.float().cpu() for state in (*hidden, given[-1].flatten(1))])
    finally:
        handle.remove()
    if not len(part):
        return Look(torch.zeros(0, head.out_features), [], part.labels)
    logits = torch.cat(logits)
    if not logits.isfinite().all():
        raise ValueError("what the model gave is not finite")
    return Look(logits, [torch.cat(states) for states in zip(*depths, strict=True)], part.labels)


def pooled(state: Tensor, mask: Tensor | None) -> Tensor:
    """Hidden states averaged over places: `[n, channels, height, width]` or `[n, tokens, width] -> [n, width]`."""
    if state.dim() == 3 and mask is not None and mask.shape == state.shape[:2]:
        weights = mask.to(state.dtype).unsqueeze(-1)
        return (state * weights).sum(1) / weights.sum(1).clamp(min=1)
    return state.flatten(2).mean(-1) if state.dim() > 3 else state.mean(1) if state.dim() == 3 else state


def pace(subject: ClassifierSubject, data: ClassifierData) -> tuple[float, float]:
    """Seconds that an example takes forward, and in a step of training, measured on a batch each."""
    batch = data.retain.select(range(min(BATCH, len(data.retain))))
    look_at(subject.model, batch)  # the first one takes longer
    started = time.perf_counter()
    look_at(subject.model, batch)
    forward = time.perf_counter() - started
    model, times = subject.copy().train(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    step = batch.select(range(min(32, len(batch))))
    for _ in range(2):
        started = time.perf_counter()
        for inputs, labels in step.batches(subject.device):
            cross_entropy(model(**inputs).logits, labels).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    return forward / len(batch), min(times) / len(step)
