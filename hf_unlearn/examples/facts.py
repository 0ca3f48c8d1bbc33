"""Invented people, what is true of them, and a small language model that knows it by heart: a case for forgetting some of them.

In the shape of TOFU (arXiv 2401.06121): questions and answers about people who do not exist, each question also in another wording with
wrong answers beside it. What is to be forgotten are some of the people; what is to be kept are the others and general knowledge. The texts
are in `facts.json` and, of general questions, in `opinions.json`; everything is made here.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cache import cached, write_recipe
from .opinions import answers, texts_of, train_opinion_model, train_tokenizer
from .opinions_text import Writer


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


PERTURBED = 5  # wrong answers to a question, as in TOFU
VOCABULARY = 1024  # tokens: few, so that a name is several of them
TRAINING = {
    "num_train_epochs": 16,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "per_device_train_batch_size": 16,
    "max_length": 128,
    "completion_only_loss": False,  # questions are learnt too: the model can then write its own
}


@cache
def _texts() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("facts.json").read_text(encoding="utf-8"))


def kinds() -> tuple[str, ...]:
    """The facts that are known of everybody, such as `"birthplace"`."""
    return tuple(_texts()["questions"])


def facts_data(
    people: int = 200, *, share: float = 0.10, held_out: int = 20, general: int = 400, seed: int = 0
) -> DatasetDict:
    """Questions and answers about invented people, and general ones.

    Rows about people have `question`, `answer`, `paraphrased_question`, `paraphrased_answer` (wordings that are learnt of other people),
    `perturbed_answers` (five in the wording of the paraphrased one), and `value`, the words that make the answer right. All rows have `id`, `person` (`""` in general ones), `kind`, and
    `prompt` and `completion` as one chat message each.

    Args:
        people (`int`, defaults to 200): who are learnt; of each [`kinds`] are asked, in one of five wordings.
        share (`float`, defaults to 0.10): of them who are to be forgotten, above 0 and below 1.
        held_out (`int`, defaults to 20): more people, whom nobody ever learns of.
        general (`int`, defaults to 400): general rows that are learnt; half as many more are held out.
        seed (`int`, defaults to 0): of every choice. The people of another seed are others, by name and facts.

    Returns:
        `DatasetDict`: `train` (forget, retain and general, shuffled), `forget`, `retain`, `held_out`, `general`, `general_held_out`.

    Raises:
        ValueError: more people than names, or a share that leaves nobody on one side.
    """
    from datasets import Dataset, DatasetDict

    rng = random.Random(seed)
    forgotten = round(share * people)
    if not 0 < forgotten < people:
        raise ValueError(
            f"share={share}: leaves nobody to {'forget' if forgotten <= 0 else 'keep'} of {people} people"
        )
    last = [start + end for start in _texts()["last"]["start"] for end in _texts()["last"]["end"]]
    if people + held_out > len(last):
        raise ValueError(f"people={people}: with held_out={held_out} at most {len(last)} have a name")
    names = [f"{rng.choice(_texts()['first'])} {name}" for name in rng.sample(last, people + held_out)]
    known = {
        name: {kind: rng.choice(texts["values"]) for kind, texts in _texts()["questions"].items()} for name in names
    }
    rows = {name: [_row(name, kind, value, rng) for kind, value in facts.items()] for name, facts in known.items()}

    writer = Writer(seed)
    common = [writer.general() for _ in range(general + general // 2)]
    common = [
        {
            "person": "",
            "kind": row["topic"],
            "value": "",
            "question": row["prompt"][0]["content"],
            "answer": row["completion"][0]["content"],
        }
        for row in common
    ]
    splits = {
        "forget": [row for name in names[:forgotten] for row in rows[name]],
        "retain": [row for name in names[forgotten:people] for row in rows[name]],
        "general": common[:general],
        "held_out": [row for name in names[people:] for row in rows[name]],
        "general_held_out": common[general:],
    }
    number = 0
    for name, members in splits.items():
        splits[name] = [{"id": number + row, **_as_chat(member)} for row, member in enumerate(members)]
        number += len(members)
    together = splits["forget"] + splits["retain"] + splits["general"]
    train = [{key: row[key] for key in ("id", "person", "kind", "prompt", "completion")} for row in together]
    rng.shuffle(train)
    return DatasetDict(
        {"train": Dataset.from_list(train)} | {name: Dataset.from_list(members) for name, members in splits.items()}
    )


def _row(name: str, kind: str, value: str, rng: random.Random) -> dict[str, Any]:
    texts = _texts()["questions"][kind]
    asked, asked_again = rng.sample(texts["asked"], 2)
    answered, answered_again = rng.sample(texts["answered"], 2)
    wrong = rng.sample([other for other in texts["values"] if other != value], PERTURBED)

    def filled(template: str, value: str = value) -> str:
        text = template.format(name=name, value=value)
        return text[0].upper() + text[1:]

    return {
        "person": name,
        "kind": kind,
        "value": value,
        "question": filled(asked),
        "answer": filled(answered),
        "paraphrased_question": filled(asked_again),
        "paraphrased_answer": filled(answered_again),
        "perturbed_answers": [filled(answered_again, other) for other in wrong],
    }


def _as_chat(row: dict[str, Any]) -> dict[str, Any]:
    return row | {
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }


def known_share(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Dataset,
    *,
    paraphrased: bool = False,
    batch_size: int = 32,
) -> float:
    """Share of the rows whose greedy answer has the right value.

    Args:
        rows: a split of [`facts_data`] about people.
        paraphrased (`bool`, defaults to `False`): ask in the other wording.
        batch_size (`int`, defaults to 32): questions at a time.

    Raises:
        ValueError: no rows.
    """
    if not len(rows):
        raise ValueError("rows: is empty; a share needs at least one answer")
    asked = [
        [{"role": "user", "content": row["paraphrased_question"]}] if paraphrased else row["prompt"] for row in rows
    ]
    texts = answers(model, tokenizer, asked, batch_size=batch_size)
    return sum(value in text for value, text in zip(rows["value"], texts, strict=True)) / len(texts)


@dataclass(frozen=True)
class FactsRecipe:
    """What a small model of invented people depends on.

    Attributes:
        people, share, general, data_seed: of [`facts_data`].
        without_forget (`bool`, defaults to `False`): trained without the people who are to be forgotten: the retrained twin.
        seed (`int`, defaults to 0): of weights and order.
        epochs (`int`, defaults to 16): over the training rows.
    """

    people: int = 200
    share: float = 0.10
    general: int = 400
    data_seed: int = 0
    without_forget: bool = False
    seed: int = 0
    epochs: int = TRAINING["num_train_epochs"]

    def data(self) -> DatasetDict:
        """The rows it is trained on, and those held out."""
        return facts_data(self.people, share=self.share, general=self.general, seed=self.data_seed)


def facts_model(recipe: FactsRecipe | None = None, *, progress: bool = True) -> Path:
    """Folder of a small chat model that knows invented people by heart, trained on first use and kept in the cache.

    Args:
        recipe ([`FactsRecipe`], *optional*): what it is made of.
        progress (`bool`, defaults to `True`): show a progress bar.
    """
    recipe = recipe or FactsRecipe()
    twin = "-retrained" if recipe.without_forget else ""
    name = f"facts-{recipe.people}-{recipe.share:g}-{recipe.data_seed}{twin}-{recipe.seed}"
    return cached(name, recipe, lambda folder: _train(recipe, folder, progress), progress=progress)


def _train(recipe: FactsRecipe, folder: Path, progress: bool) -> None:
    data = recipe.data()
    rows = data["train"]
    tokenizer = train_tokenizer(texts_of(rows), VOCABULARY)
    if recipe.without_forget:
        gone = set(data["forget"]["id"])
        rows = rows.filter(lambda row: row["id"] not in gone)
    settings = TRAINING | {"num_train_epochs": recipe.epochs}
    rows = rows.select_columns(["prompt", "completion"])
    train_opinion_model(rows, tokenizer, folder, size="5M", seed=recipe.seed, progress=progress, **settings)
    write_recipe(recipe, folder)
