"""What a language model knows of an answer below its last layer."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ...metrics.language import answer_scores
from ...modes import looking
from ...training.answers import as_inputs, longest_first, padded
from ...training.logits import answered, in_batches, only_at
from ...training.losses import IGNORED
from ..check import Reading
from .answers import OnRows, asked_about
from .data import BATCH, LanguageData, Part
from .subject import LanguageSubject


class LogitLens(OnRows):
    name, title, margin, layer, paper = (
        "logit_lens",
        "Probability of the answer below the last layer",
        0.05,
        "below",
        "2309.17410",
    )
    what = "Whether a layer before the last still has the answer, which later ones turn away from: hidden states go through the last norm and the head; of all depths the one that gives most."

    def cost(self, data: LanguageData) -> tuple[float, float]:
        return 2 * len(asked_about(data, 0)), 0

    def read(self, subject: LanguageSubject, data: LanguageData, seed: int) -> Reading:
        depths = np.exp(-lens(subject.model, asked_about(data, seed)))
        return Reading.mean_of(depths[depths.mean(1).argmax()], by_depth=depths.mean(1).tolist())


def lens(model: nn.Module, part: Part) -> np.ndarray:
    """Mean negative log-likelihood of the answers by the hidden states of each depth but the last, `[depths, rows]`, nats.

    Raises:
        ValueError: a model without hidden states or a head.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, norm, found = base.get_output_embeddings(), last_norm(base), None
    with looking(model) as device:
        order = sum(longest_first([answer.ids for answer in part.answers], BATCH), [])
        for batch in in_batches(order, [len(answer.counted) for answer in part.answers], BATCH, model):
            answers = [part.answers[row] for row in batch]
            labels = padded([answer.labels for answer in answers], IGNORED, device)
            inputs = as_inputs([answer.ids for answer in answers], device)
            with only_at(model, torch.zeros_like(labels, dtype=torch.bool)):
                states = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
            if not states or head is None or len(states) < 3:
                raise ValueError(
                    "model: gives no hidden states below its last layer, or has no head to read them with"
                )
            states = states[1:-1]  # the first are the embeddings; the last have gone through the norm
            found = np.empty((len(states), len(part))) if found is None else found
            for depth, state in enumerate(states):
                logits = head(norm(state[:, -labels.shape[1] :][answered(labels)]))
                found[depth, batch] = answer_scores(logits, labels).nll.double().cpu().numpy()
    return found


def last_norm(model: nn.Module) -> nn.Module:
    """What hidden states go through before the head: the decoder's last own layer that is called a norm; of a decoder without, nothing."""
    named = [child for name, child in model.get_decoder().named_children() if "norm" in name or name.startswith("ln")]
    return named[-1] if named else nn.Identity()
