"""Who takes a subject's place, and what redirect asks: each forget text beside the same about a stranger, and further questions."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset
from torch import nn

from ...training.answers import written
from ...training.losses import IGNORED
from .asked import Pair, has_prompt, log_p, prompt_of
from .subject import Subjects, Word, Words


FURTHER = 2  # further questions for each forget text
TRIES = 9  # strangers for each subject, of whom one is taken
REPEATED = 0.5  # probability of a stranger's name where an answer has one: the model can repeat it


def of_forget_rows(rows: Dataset, subjects: Subjects) -> list[Pair]:
    """Each forget text beside the same about somebody else; a passage without a question sentence by sentence."""
    texts = _read(rows, subjects.words)
    return [_beside(*text, subject, subjects) for text, subject in zip(texts, subjects.of, strict=True)]


def _read(rows: Dataset, words: Words) -> list[tuple[list[int], list[int], list[Word]]]:
    """Ids, labels and words of each row."""
    return [(ids, labels, words.of(ids)) for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)]


def _beside(ids: list[int], labels: list[int], read: list[Word], subject: tuple[str, ...], subjects: Subjects) -> Pair:
    if not subject:
        return Pair(ids, labels, None, [])
    other, words = subjects.replaced(ids, subjects.strangers[subject], read), subjects.words
    alone = [] if has_prompt(labels) else words.sentences(other.ids)
    return Pair(ids, labels, other.ids, other.places, alone, words.special_before(other.ids))


def choose_strangers(
    model: nn.Module, rows: Dataset, subjects: Subjects, *, tries: int = TRIES, seed: int = 0
) -> None:
    """Of several strangers for each subject, take the one of whom the true answers are as likely as of most: some names happen to remind
    the model of the very subject. Where the model repeats none of the names that are made up, take of those that it knows the one that it
    repeats best.

    Args:
        model: the original.
        rows (`Dataset`): `input_ids` and `labels`.
        subjects ([`Subjects`]): of these rows; gets the strangers.
        tries (`int`, defaults to 9): strangers for each subject who are made up; of names that are known, parts of longer ones among them, three
            times as many.
        seed (`int`, defaults to 0): of the strangers.
    """
    about: dict[tuple[str, ...], list[int]] = {}
    for row, name in enumerate(subjects.of):
        if name:
            about.setdefault(name, []).append(row)
    texts = _read(rows, subjects.words)

    def tried(names: Iterable[tuple[str, ...]], known: bool) -> dict[tuple[str, ...], list[tuple[float, float, dict]]]:
        """Of each of the names: how likely the true answers are, how likely the name is, and the stranger."""
        found: dict[tuple[str, ...], list] = {name: [] for name in names}
        number = tries * (3 if known else 1) if found else 0
        for one in range(number):
            subjects.strangers = subjects.drawn(seed * number + one, known=known)
            pairs = [_beside(*texts[row], name, subjects) for name in found for row in about[name]]
            likely, said = log_p(model, pairs)
            counts = [len(about[name]) for name in found]
            for name, its, its_name in zip(found, likely.split(counts), said.split(counts), strict=True):
                repeated = its_name.nanmean().nan_to_num(1.0).item()  # 1 where no answer has the name
                found[name].append((its.nansum().item(), repeated, subjects.strangers[name]))
        return found

    taken = {}
    for name, some in tried(about, known=False).items():
        if max(said for _, said, _ in some) >= REPEATED:
            # A little below the middle: a model that never met the subject is reminded of it by no name at all.
            taken[name] = sorted(some, key=lambda one: one[0])[3 * tries // 8][2]
    for name, some in tried([name for name in about if name not in taken], known=True).items():
        taken[name] = max(some, key=lambda one: one[1])[2]
    subjects.strangers = taken


def further_questions(
    rows: Dataset,
    subjects: Subjects,
    model: nn.Module,
    tokenizer: Any,
    *,
    each: int = FURTHER,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> list[Pair]:
    """Questions that other forget texts ask, about each text's subject, with answers that the model writes about somebody else. Of a passage
    without a question the words up to the name stand for one. Where most answers name the stranger, those are left out that do not: they may
    be about anybody.

    Args:
        rows (`Dataset`): `input_ids` and `labels`.
        subjects ([`Subjects`]): of these rows.
        model, tokenizer: the original.
        each (`int`, defaults to 2): questions for each row.
        max_new_tokens (`int`, defaults to 256): of an answer.
        seed (`int`, defaults to 0): of questions and answers.
    """
    rng = random.Random(seed)
    prompts = [
        prompt_of(ids, labels) if has_prompt(labels) else ids[: subjects.named_by(ids, subject)]
        for ids, labels, subject in zip(rows["input_ids"], rows["labels"], subjects.of, strict=True)
    ]
    alike: dict[int, list[int]] = {}
    for row, name in enumerate(subjects.of):
        alike.setdefault(len(name), []).append(row)
    asked: list[list[int]] = []
    about: list[tuple[str, ...]] = []
    for subject in subjects.of:
        for _ in range(each if subject else 0):
            row = rng.choice(alike[len(subject)])
            stranger = dict(zip(subjects.of[row], subjects.strangers[subject].values(), strict=True))
            asked.append(subjects.replaced(prompts[row], stranger).ids)
            about.append(subject)
    answers = written(model, tokenizer, asked, max_new_tokens=max_new_tokens, seed=seed)
    real = {
        subject: {new.casefold(): subjects.surface[word] for word, new in stranger.items()}
        for subject, stranger in subjects.strangers.items()
    }
    names = [
        {word.text for word in subjects.words.of(answer)}.issuperset(real[subject])
        for answer, subject in zip(answers, about, strict=True)
    ]
    mostly = _mostly(about, names)
    found = []
    for prompt, answer, subject, is_named in zip(asked, answers, about, names, strict=True):
        if not answer or (subject in mostly and not is_named):
            continue
        question, said = subjects.replaced(prompt, real[subject]), subjects.replaced(answer, real[subject])
        begin = len(question.ids)
        ids = question.ids + said.ids
        places = [-1] * len(ids)
        for there, here in enumerate(
            [*question.places, *(place + begin if place >= 0 else -1 for place in said.places)]
        ):
            if here >= 0:
                places[here] = there
        found.append(Pair(ids, [IGNORED] * begin + said.ids, [*prompt, *answer], places))
    return found


def _mostly(subjects: Sequence[tuple[str, ...]], named: Sequence[bool]) -> set[tuple[str, ...]]:
    """Subjects that are named in more than half of the answers."""
    found: dict[tuple[str, ...], list[bool]] = {}
    for subject, one in zip(subjects, named, strict=True):
        found.setdefault(subject, []).append(one)
    return {subject for subject, some in found.items() if 2 * sum(some) > len(some)}
