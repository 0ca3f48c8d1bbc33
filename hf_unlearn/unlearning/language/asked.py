"""Rows and what they are to be answered: distributions of the frozen original, where a row says so about somebody else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

from ...files import load_tensors, save_tensors
from ...metrics.language import AT_ONCE
from ...modes import in_eval_mode
from ...training.answers import as_inputs
from ...training.logits import in_batches, logits_at, places_of
from ...training.losses import IGNORED
from .targets import Targets, likeliest


@dataclass(frozen=True)
class Asked:
    """Rows and what they are to be answered.

    Attributes:
        rows (`Dataset`): `input_ids` and `labels`, −100 where nothing is asked.
        targets ([`Targets`]): distributions at the labels that count, row after row.
    """

    rows: Dataset
    targets: Targets

    def save(self, file: Path) -> None:
        """Write ids, labels and targets into one file."""
        lengths = torch.tensor([len(ids) for ids in self.rows["input_ids"]])
        flat = {
            name: torch.tensor([value for row in self.rows[name] for value in row]) for name in ("input_ids", "labels")
        }
        save_tensors(flat | {"lengths": lengths} | vars(self.targets), file)

    @classmethod
    def load(cls, file: Path) -> Asked:
        tensors = load_tensors(file)
        lengths = tensors.pop("lengths").tolist()
        rows = {name: [part.tolist() for part in tensors.pop(name).split(lengths)] for name in ("input_ids", "labels")}
        return cls(Dataset.from_dict(rows), Targets(**tensors))


@dataclass(frozen=True)
class Pair:
    """A row, and the one about somebody else from which it gets its answers.

    Attributes:
        ids (`list[int]`): the row.
        labels (`list[int]`): its labels.
        other (`list[int]`, *optional*): the row about somebody else; `ids` itself where the model's own answer is to stay.
        places (`list[int]`): for each token of `ids` where it, or what stands for it, is in `other`; −1 where nothing does.
        sentences (`list[int]`, *optional*): where in `other` sentences begin that are read by themselves: what went before tells whom a passage
            is about, whatever name it has.
        lead (`int`, defaults to 0): first tokens of `other` that are read before each sentence.
    """

    ids: list[int]
    labels: list[int]
    other: list[int] | None
    places: list[int]
    sentences: Sequence[int] = ()
    lead: int = 0


def has_prompt(labels: Sequence[int]) -> bool:
    """Whether anything stands before the tokens that count."""
    return not any(label != IGNORED for label in labels[:2])


def prompt_of(ids: Sequence[int], labels: Sequence[int]) -> list[int]:
    """The tokens before the first that counts; of a text in which all count, all of it."""
    first = next((place for place, label in enumerate(labels) if label != IGNORED), len(ids))
    return list(ids[:first] if has_prompt(labels) else ids)


def kept_rows(rows: Iterable[tuple[list[int], list[int]]]) -> list[Pair]:
    """Rows of ids and labels whose answers are to stay."""
    return [Pair(ids, labels, ids, []) for ids, labels in rows]


def ask(model: nn.Module, pairs: Sequence[Pair], *, batch_size: int = 16) -> Asked:
    """The model's answers: about somebody else where a row has them, with the names exchanged; its own elsewhere.

    A row without anybody else (`other` is None) is answered without its own tokens, as DELETE does.
    """
    parts: list[list[Tensor]] = [[]] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda row: len(pairs[row].ids))
    counted = [sum(label != IGNORED for label in pair.labels) for pair in pairs]
    for rows in in_batches(order, counted, batch_size, model):
        some = [pairs[row] for row in rows]
        asked = [[t for t, label in enumerate(pair.labels) if label != IGNORED and t > 0] for pair in some]
        own = _logits(model, [pair.ids for pair in some], [[t - 1 for t in places] for places in asked])
        changed = [place for place, pair in enumerate(some) if pair.other not in (None, pair.ids)]
        there = [[max(some[place].places[t] - 1, 0) for t in asked[place]] for place in changed]
        others = dict(zip(changed, _of_others(model, [some[place] for place in changed], there), strict=True))
        for place, (pair, logits) in enumerate(zip(some, own, strict=True)):
            if pair.other is None:
                answer = torch.tensor([[pair.labels[t]] for t in asked[place]], device=logits.device)
                logits = logits.scatter(-1, answer, -torch.inf)
            elif place in others:
                stays = torch.tensor([[pair.places[t] <= 0] for t in asked[place]], device=logits.device)
                logits = torch.where(stays, logits, _named(others[place], pair, asked[place]))
            answer = torch.tensor([pair.labels[t] for t in asked[place]], device=logits.device)
            parts[rows[place]] = _said(logits, answer)
    counts = torch.tensor([0, *(len(part[0]) for part in parts)])
    targets = Targets(counts.cumsum(0), *(torch.cat(column) for column in zip(*parts, strict=True)))
    ids, labels = [pair.ids for pair in pairs], [pair.labels for pair in pairs]
    return Asked(Dataset.from_dict({"input_ids": ids, "labels": labels}), targets)


def _said(logits: Tensor, answer: Tensor) -> list[Tensor]:
    """What [`Targets`] keeps of places, on the CPU; few at a time, since this takes their logits in fp32 three times."""
    few = max(1, AT_ONCE // logits.shape[-1])
    parts = [
        (*likeliest(some), -F.cross_entropy(some.float(), tokens, reduction="none"))
        for some, tokens in zip(logits.split(few), answer.split(few), strict=True)
    ]
    return [torch.cat(part).cpu() for part in zip(*parts, strict=True)]


def _is_same(pair: Pair, place: int) -> bool:
    return pair.places[place] > 0 and pair.other[pair.places[place]] == pair.ids[place]


def _named(logits: Tensor, pair: Pair, asked: Sequence[int]) -> Tensor:
    """What is said of somebody else, with a name's token in the place of the stranger's that stands for it."""
    rows = [number for number, place in enumerate(asked) if pair.places[place] > 0 and not _is_same(pair, place)]
    if not rows:
        return logits
    mine, theirs = (
        torch.tensor(tokens, device=logits.device)
        for tokens in zip(*((pair.ids[asked[row]], pair.other[pair.places[asked[row]]]) for row in rows), strict=True)
    )
    named = logits.clone()
    named[rows, mine], named[rows, theirs] = logits[rows, theirs], logits[rows, mine]
    return named


def log_p(model: nn.Module, pairs: Sequence[Pair], *, batch_size: int = 16) -> tuple[Tensor, Tensor]:
    """Of each row's answer where it is about somebody else.

    Returns:
        `tuple[Tensor, Tensor]`: `[rows]` each: its log-probability without the names, nats, and the mean probability of the names' tokens;
        NaN where there are none, or it is about nobody else.
    """
    whole, names = torch.full((len(pairs),), torch.nan), torch.full((len(pairs),), torch.nan)
    order = sorted((row for row in range(len(pairs)) if pairs[row].other), key=lambda row: len(pairs[row].ids))
    counted = [len(pair.other or ()) for pair in pairs]
    for rows in in_batches(order, counted, batch_size, model):
        there = [range(_answer_begins(pairs[row]), len(pairs[row].other)) for row in rows]
        before = [[place - 1 for place in places] for places in there]
        found = _of_others(model, [pairs[row] for row in rows], before)
        for row, places, logits in zip(rows, there, found, strict=True):
            pair, values = pairs[row], logits.float().log_softmax(-1)
            values = values[range(len(places)), [pair.other[place] for place in places]]
            same = {pair.places[place] for place in range(len(pair.ids)) if _is_same(pair, place)}
            is_same = torch.tensor([place in same for place in places], device=values.device)
            whole[row], names[row] = values[is_same].sum(), values[~is_same].exp().mean()
    return whole, names


def _answer_begins(pair: Pair) -> int:
    first = next(place for place, label in enumerate(pair.labels) if label != IGNORED)
    return max(pair.places[:first], default=0) + 1


def _of_others(model: nn.Module, pairs: Sequence[Pair], places: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits `[places, vocabulary]` about somebody else at some of each pair's places, sentence by sentence where it has sentences."""
    parts, wanted, where = [], [], []
    for number, (pair, some) in enumerate(zip(pairs, places, strict=True)):
        for begin, end in pairwise((0, *pair.sentences, len(pair.other))):
            inside = [index for index, place in enumerate(some) if begin <= place < end]
            lead = pair.other[: pair.lead] if begin else []
            if inside or not some:
                parts.append([*lead, *pair.other[begin:end]])
                wanted.append([len(lead) + some[index] - begin for index in inside])
                where.append((number, inside))
    found: list[Tensor | None] = [None] * len(pairs)
    for (number, inside), logits in zip(where, _logits(model, parts, wanted), strict=True):
        if found[number] is None:
            found[number] = logits.new_empty(len(places[number]), logits.shape[-1])
        found[number][inside] = logits
    return found


def _logits(model: nn.Module, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits `[places, vocabulary]` of each row at some of its places."""
    if not rows:
        return []
    device = next(model.parameters()).device
    inputs = as_inputs(rows, device)
    read = places_of(places, inputs["input_ids"].shape[1], device)
    with in_eval_mode(model), torch.no_grad():
        found = logits_at(model, inputs, read).split(read.sum(1).tolist())
    # A place may be asked for twice, and in any order.
    return [
        logits[torch.searchsorted(one.nonzero().flatten(), torch.tensor(some, dtype=torch.long, device=device))]
        for logits, one, some in zip(found, read, places, strict=True)
    ]
