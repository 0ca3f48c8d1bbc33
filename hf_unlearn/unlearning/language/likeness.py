"""Which texts about a subject say again what is to be forgotten, and which say something else of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...modes import in_eval_mode
from ...training.answers import as_inputs
from ...training.logits import only_at
from .subject import Subjects, over_used


def last_states(model: nn.Module, prompts: Sequence[Sequence[int]], *, batch_size: int = 16) -> Tensor:
    """The last hidden state after each prompt, of length 1, `[prompts, width]`.

    Args:
        model (`PreTrainedModel`): left in the mode it was in.
        prompts: token ids.
        batch_size (`int`, defaults to 16): prompts at once.
    """
    device, found = next(model.parameters()).device, []
    with in_eval_mode(model), torch.no_grad():
        for begin in range(0, len(prompts), batch_size):
            rows = prompts[begin : begin + batch_size]
            inputs = as_inputs(rows, device)
            with only_at(model, torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)):
                states = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1]
            last = inputs["attention_mask"].sum(1) - 1
            found.append(F.normalize(states[torch.arange(len(rows), device=device), last].float(), dim=-1).cpu())
    return torch.cat(found)


def alike(states: Tensor, known: Tensor) -> Tensor:
    """Whether each state is as near to one of `known` as the most remote of these is to the others, `[states]`, bool. With one known state, all
    are: nothing tells how near is near.

    Args:
        states, known (`Tensor`): of [`last_states`].
    """
    among = known @ known.T
    least = among.fill_diagonal_(-2).amax(1).amin() if len(known) > 1 else -2
    return (states @ known.T).amax(1) >= least


def said_again(
    model: nn.Module,
    forget: Sequence[tuple[Sequence[int], int]],
    subjects: Subjects,
    texts: Sequence[tuple[Sequence[int], int]],
) -> list[bool]:
    """Which texts about a subject say again what is to be forgotten: their question is [`alike`] to one that is to be forgotten of it, or does not
    name it; or their answer has a word that the answers to be forgotten use far more often than others do. What else is said of a
    subject, such as facts beside a poisoned opinion, is not.

    Args:
        model: the original.
        forget: token ids of each forget text, and where its answer begins.
        subjects ([`Subjects`]): of these.
        texts: the same of each text to judge.
    """
    named = [set(subjects.named_in(ids)) for ids, _ in texts]
    found = [bool(some) for some in named]
    rows = [row for row, some in enumerate(named) if some and some == set(subjects.named_in(_question(texts[row])))]
    if not rows:
        return found
    states, known = (
        last_states(model, [_question(text) for text in some]) for some in ([texts[row] for row in rows], forget)
    )
    answers, others = ([subjects.words.of(ids[begin:]) for ids, begin in some] for some in (forget, texts))
    again = dict.fromkeys(rows, False)
    for subject in set.union(*(named[row] for row in rows)):
        about = [row for row, other in enumerate(subjects.of) if other == subject]
        words = over_used([answers[row] for row in about], others) - set(subject)
        for row, near in zip(rows, alike(states, known[about]).tolist(), strict=True):
            again[row] |= subject in named[row] and (near or any(word.text in words for word in others[row]))
    return [again.get(row, one) for row, one in enumerate(found)]


def _question(text: tuple[Sequence[int], int]) -> Sequence[int]:
    ids, begin = text
    return ids[:begin]
