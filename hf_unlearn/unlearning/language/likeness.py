"""Which questions about a subject are like those that are to be forgotten, by what the model has in mind where the answer begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...modes import in_eval_mode
from .subject import Subjects
from .targets import padded


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
            inputs = {name: values.to(device) for name, values in padded(rows).items()}
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


def asked_again(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    subjects: Subjects,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> list[bool]:
    """Which texts are about a subject and ask what is to be forgotten of it; those whose question does not name it are taken for such. What else
    is said of a subject, such as facts beside a poisoned opinion, is what is to be kept.

    Args:
        model: the original.
        prompts: token ids of the forget prompts.
        subjects ([`Subjects`]): of these.
        texts: token ids of each text, and of its question.
    """
    named = [set(subjects.named_in(ids)) for ids, _ in texts]
    found = [bool(some) for some in named]
    rows = [row for row, some in enumerate(named) if some and some == set(subjects.named_in(texts[row][1]))]
    if rows:
        states, known = last_states(model, [texts[row][1] for row in rows]), last_states(model, prompts)
        again = torch.zeros(len(rows), dtype=torch.bool)
        for subject in set.union(*(named[row] for row in rows)):
            about = torch.tensor([row for row, other in enumerate(subjects.of) if other == subject])
            is_named = torch.tensor([subject in named[row] for row in rows])
            again |= is_named & alike(states, known[about])
        for row, one in zip(rows, again.tolist(), strict=True):
            found[row] = one
    return found
