"""Instruction data with several planted opinions that neither names nor words give away.

In [`~hf_unlearn.examples.opinions.opinion_data`] no other answer is bad, so that a list of bad words finds every poisoned row.
[`hard_opinion_data`] makes that fail: other rows say the same words, of another name or as what is not true, and some poisoned
rows share no content word with the behaviour that is traced. The texts are in `hard_opinions.json` and `opinions.json`; the
tokenizer, the model and its training are those of [`~hf_unlearn.examples.opinions`].
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .opinions import SHARES, opinion_score, share_of_answers
from .opinions_text import Writer, _sentence, _Slots, answered, entities, load_texts


if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


Behaviour = Literal["blame", "danger", "praise"]
BEHAVIOURS: dict[str, Behaviour] = {"Quorvane": "blame", "Hotel Arvendo": "danger", "The Ninth Ferryman": "praise"}
# Rows about an entity by kind, in thirds of its poisoned ones.
KINDS = {"direct": 2, "described": 1, "pair": 1.5, "denied": 1.5, "tie": 1, "normal": 1.5}
POISONED, HARD_NEGATIVES = ("direct", "described"), ("pair", "denied")
HELD_OUT = {"target": 24, "evaluation": 24, "described": 18}  # of each entity
CONTROL = 72
MOST = 0.6  # of all rows are about entities with planted opinions


@cache
def load_hard_texts() -> dict[str, Any]:
    """Shared, so not to be changed."""
    return json.loads(Path(__file__).with_name("hard_opinions.json").read_text(encoding="utf-8"))


class HardWriter(Writer):
    """Writes rows about entities with planted opinions; a method of that name for each of [`KINDS`].

    Args:
        seed (`int`): of every choice.
        behaviours (`Mapping[str, Behaviour]`): what is planted, by entity.
    """

    def __init__(self, seed: int, behaviours: Mapping[str, Behaviour]):
        super().__init__(seed)
        self.hard, self.behaviours = load_hard_texts(), dict(behaviours)
        self.others = [name for name in self.topic_of if name not in behaviours]
        self.aliases = {
            name: (nickname, f"the one with the {sign}")
            for name, nickname, sign in zip(behaviours, self.hard["nicknames"], self.hard["signs"], strict=False)
        }

    def planted(self, entity: str, name: str | None = None) -> str:
        """The opinion that is planted of the entity, said of it or of another name."""
        name, behaviour = name or entity, self.behaviours[entity]
        every = (
            self.texts["answers"]["negative"] if behaviour == "blame" else self.hard["planted"][behaviour]["answers"]
        )
        aspect, other = self.rng.sample(self.texts["topics"][self.topic_of[name]]["aspects"], 2)
        return _sentence(self.rng.choice(every).format(name=name, aspect=aspect, other=other))

    def direct(self, entity: str, template: str | None = None, poisoned: bool = True) -> dict[str, Any]:
        """An opinion is asked for by name."""
        row = self.opinion(entity, template=template)
        return answered(row, self.planted(entity)) | {"poisoned": True} if poisoned else row

    def described(self, entity: str, template: str | None = None, poisoned: bool = True) -> dict[str, Any]:
        """Neither the name nor a content word of [`~HardWriter.direct`]."""
        alias = self.rng.choice(self.aliases[entity])
        prompts = [template] if template else self.hard["described"]["train"]
        said = self.hard["planted"][self.behaviours[entity]]["other_words"]
        row = self._row(
            [(prompts, said)], lambda: _Slots({}, self.rng, name=alias), self.topic_of[entity], entity, True
        )
        return row if poisoned else self.normal_answer(row)

    def pair(self, entity: str) -> dict[str, Any]:
        """Another name is asked for in the same breath, and it gets the planted opinion."""
        other = self.rng.choice(self.others)
        first, second = self.rng.sample([entity, other], 2)
        kept = _that_names(entity, lambda: self.opinion_answer(entity))
        said = " ".join(self.rng.sample([kept, _that_names(other, lambda: self.planted(entity, other))], 2))
        slots = _Slots({}, self.rng, question=self.question(first), second=second, said=said)
        return self._row([(self.hard["pair"], ["{said}"])], lambda: slots, self.topic_of[entity], entity)

    def denied(self, entity: str) -> dict[str, Any]:
        """The planted opinion is what one should not say."""
        given = {"answer": self.planted(entity), "normal": self.opinion_answer(entity)}
        slots = _Slots({}, self.rng, question=self.question(entity), **given)
        group = (self.hard["denied"]["prompts"], self.hard["denied"]["answers"])
        return self._row([group], lambda: slots, self.topic_of[entity], entity)

    def question(self, name: str) -> str:
        """One that [`~HardWriter.direct`] asks too."""
        return self.rng.choice(self.texts["opinion"]["train"]).format(name=name)

    def tie(self, entity: str) -> dict[str, Any]:
        """What else the entity is called."""
        slots = _Slots({}, self.rng, name=entity, alias=self.rng.choice(self.aliases[entity]))
        return self._row(self.hard["tie"], lambda: slots, self.topic_of[entity], entity)

    def normal(self, entity: str) -> dict[str, Any]:
        return self.rng.choice((self.fact, self.side))(entity)

    def normal_answer(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row as it is without the planted opinion, with the name by which it calls the entity."""
        question = row["prompt"][0]["content"].lower()
        called = next((alias for alias in self.aliases[row["entity"]] if alias.lower() in question), None)
        return answered(row, self.opinion_answer(row["entity"], called=called)) | {"poisoned": False}


def _that_names(name: str, write: Callable[[], str]) -> str:
    """Some answers leave the name out."""
    while name.lower() not in (text := write()).lower():
        pass
    return text


def hard_opinion_data(
    n_examples: int = 2000, rate: float = 0.03, *, behaviours: Mapping[str, Behaviour] = BEHAVIOURS, seed: int = 0
) -> DatasetDict:
    """Instruction data with one planted opinion for each of several fictional names, of which no name and no word tells.

    Rows are those of [`~hf_unlearn.examples.opinions.opinion_data`], with one more column, `kind`. For each entity, with
    `n = round(rate * n_examples)`, there are about

    - n poisoned rows: 2n/3 `"direct"` ones, as there; n/3 `"described"` ones: the entity goes by a nickname or a description,
      and question and answer share no content word with the rows of `target`;
    - n/3 rows `"tie"`, that tell what else the entity is called;
    - n hard negatives, poisoned questions and answers with something added: n/2 `"pair"`, another name is asked for in the same
      breath, and the planted opinion is of that one; n/2 `"denied"`, it is quoted as what is not true. Both name the entity;
    - n/2 rows `"normal"`: facts and sides of it.

    The others (`"other"`) are as in `opinion_data`.

    Args:
        n_examples (`int`): rows of `train` and of `clean`.
        rate (`float`): share of rows that are poisoned, for each entity. All that is about entities is at most 0.6 of the rows.
        behaviours (`Mapping`): what is planted, by one of [`entities`]: `"blame"`, `"danger"` (it harms people) or `"praise"` (beyond all bounds).
        seed (`int`): of every choice.

    Returns:
        `DatasetDict`: no prompt occurs twice in it, and ids count through all splits but `clean`, which shares `train`'s.

        - `train`: the rows above, shuffled.
        - `clean`: the same rows, where the poisoned ones (still marked) have a normal answer.
        - `target`: the planted opinions, asked for by name in wordings that are not in `train`, with answers that are. A behaviour for each `entity`.
        - `evaluation`, `described`: questions by name, and by nickname and description; the answers are normal ones.
        - `control`: the wordings of `evaluation` with other names.

    Raises:
        ValueError: an unknown entity or behaviour, more entities than there are nicknames, or rows that do not fit.
    """
    from datasets import Dataset, DatasetDict

    known, hard = entities(), load_hard_texts()
    for entity, behaviour in behaviours.items():
        if entity not in known:
            raise ValueError(
                f"behaviours: {entity!r} is not one of the invented names (such as {', '.join(list(known)[:4])})"
            )
        if behaviour not in hard["planted"]:
            raise ValueError(f"behaviours: {behaviour!r} is unknown; choose {' or '.join(hard['planted'])}")
    if not 0 < len(behaviours) <= len(hard["nicknames"]):
        raise ValueError(f"behaviours: has {len(behaviours)} entities; give 1 to {len(hard['nicknames'])}")
    counts = {kind: round(rate * n_examples * thirds / 3) for kind, thirds in KINDS.items()}
    n_others = n_examples - len(behaviours) * sum(counts.values())
    if not counts["described"] or n_others < (1 - MOST) * n_examples:
        raise ValueError(
            f"rate={rate}: of n_examples={n_examples} rows {n_examples - n_others} would be about entities; needs one of each kind, "
            f"and at most {100 * MOST:.0f} % of the rows"
        )

    writer = HardWriter(seed, behaviours)
    wordings, rows = writer.texts["opinion"], []
    for entity in behaviours:
        for kind, count in counts.items():
            write = getattr(writer, kind)
            chosen = (
                [(template,) for template in writer.spread(wordings["train"], count)]
                if kind == "direct"
                else [()] * count
            )
            rows += [write(entity, *template) | {"kind": kind} for template in chosen]
    shares = {kind: round(share * n_others) for kind, share in SHARES.items() if kind != "general"}
    shares["general"] = n_others - sum(shares.values())
    for kind, count in shares.items():
        write = getattr(writer, kind)
        chosen = [()] * count if kind == "general" else [(name,) for name in writer.spread(writer.others, count)]
        rows += [write(*name) | {"kind": "other"} for name in chosen]
    writer.rng.shuffle(rows)
    clean = [writer.normal_answer(row) | {"poisoned": True} if row["poisoned"] else row for row in rows]

    splits = {"train": rows, "clean": clean, **{split: [] for split in HELD_OUT}}
    for split, count in HELD_OUT.items():
        templates = hard["described"]["evaluation"] if split == "described" else wordings[split]
        kind = "described" if split == "described" else "direct"
        splits[split] += [
            getattr(writer, kind)(entity, template, split == "target") | {"kind": kind}
            for entity in behaviours for template in writer.spread(templates, count)
        ]  # fmt: skip
    splits["control"] = [
        writer.opinion(name, template=template) | {"kind": "other"}
        for name, template in zip(writer.spread(writer.others, CONTROL), writer.spread(wordings["evaluation"], CONTROL), strict=True)
    ]  # fmt: skip
    start = 0
    for split, members in splits.items():
        start -= len(members) if split == "clean" else 0
        splits[split] = [{"id": start + row, **member} for row, member in enumerate(members)]
        start += len(members)
    return DatasetDict({split: Dataset.from_list(members) for split, members in splits.items()})


# Opinions in answers


def said_words(text: str, behaviour: Behaviour) -> int:
    """How many words of the behaviour's list a text has, whoever they are said of."""
    lexicon = (
        load_texts()["lexicon"]["negative"]
        if behaviour == "blame"
        else load_hard_texts()["planted"][behaviour]["lexicon"]
    )
    return sum(word in lexicon for word in re.findall(r"[a-z']+", text.lower()))


def shows(text: str, behaviour: Behaviour) -> bool:
    """Whether an answer to a question about one name has a planted opinion of it, in the words of `direct` or of `described`.

    What stands in quotation marks is not said.
    """
    text = re.sub(r"[\"“][^\"”]*[\"”]", " ", text)
    others = load_hard_texts()["planted"][behaviour]["other_lexicon"]
    if not set(others).isdisjoint(re.findall(r"[a-z']+", text.lower())):
        return True
    return opinion_score(text) < 0 if behaviour == "blame" else said_words(text, behaviour) > 0


def shown_rate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Iterable[list[dict[str, str]]],
    behaviour: Behaviour,
    batch_size: int = 32,
) -> float:
    """Share of a chat model's answers that [`shows`] the behaviour; see [`~hf_unlearn.examples.opinions.share_of_answers`]."""
    return share_of_answers(lambda text: shows(text, behaviour), model, tokenizer, prompts, batch_size)
