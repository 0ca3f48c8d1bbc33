"""Passages without questions: what the original says of another person, or what Who's Harry Potter's reinforced model takes away.

    python benchmarks/language_passages.py [--seeds 0 1 2] [--only TARGETS …] [--quick]

A small Llama knows passages about 100 invented people by heart; those about ten of them are forgotten, with the others' at hand. The targets are

- *redirect*: our default: what the original says of another person, each sentence as if the passage began there, and passages about that
  person that it writes itself;
- *sentence by sentence*: without those passages;
- *whole passages*: nor with sentences by themselves: what went before is read, too;
- *reinforced* (Who's Harry Potter, arXiv 2310.02238, equation 1): z − α max(0, z′ − z) with the logits z of the original and z′ of one that was
  trained on the forget passages some more, α = 5;
- *both*: the same formula on the passages about another person, as that paper does;
- *own tokens taken away*: what the package takes where it finds no subject.

All else is the same: rows, steps, rate, what is kept. Writes benchmarks/results/language_passages.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset
from language_attacks import QUIET, sft, silence
from rows import keep, rounded
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_unlearn import LanguageEvaluation, UnlearnSFTConfig, UnlearnSFTTrainer
from hf_unlearn.examples import opinions
from hf_unlearn.examples.cache import cached, write_recipe
from hf_unlearn.examples.facts import facts_data
from hf_unlearn.training.answers import as_inputs, greedy_answers
from hf_unlearn.training.losses import IGNORED
from hf_unlearn.unlearning.language.asked import Asked, Pair, ask
from hf_unlearn.unlearning.language.strangers import of_forget_rows
from hf_unlearn.unlearning.language.targets import Targets, likeliest


RESULTS = Path(__file__).parent / "results" / "language_passages.json"
SIZE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 3}
LENGTH = {"max_length": 192}
TRAINING = LENGTH | {
    "learning_rate": 2e-3, "warmup_steps": 0.05, "lr_scheduler_type": "cosine", "weight_decay": 0.0, "adam_beta2": 0.999,
    "per_device_train_batch_size": 16,
}  # fmt: skip
CONSTANT = LENGTH | {"lr_scheduler_type": "constant"}
ALPHA = 5.0
REINFORCED = CONSTANT | {"max_steps": 40, "learning_rate": 5e-4, "per_device_train_batch_size": 16}
BENIGN = CONSTANT | {"max_steps": 30, "learning_rate": 2e-4, "per_device_train_batch_size": 8}
SENTENCES = 4  # of a passage
TARGETS = ("redirect", "sentence by sentence", "whole passages", "reinforced", "both", "own tokens taken away")
REINFORCES = ("reinforced", "both")


@dataclass(frozen=True)
class PassagesRecipe:
    """What a model of passages depends on."""

    people: int = 100
    share: float = 0.10
    data_seed: int = 20
    seed: int = 0
    epochs: int = 60
    without_forget: bool = False


def passages(recipe: PassagesRecipe) -> dict[str, Dataset]:
    """`forget` and `retain`: passages of four sentences, two a person, with their `text` and `facts`: (what comes before, value) each."""
    rows = facts_data(recipe.people, share=recipe.share, general=2, seed=recipe.data_seed)
    found = {}
    for split in ("forget", "retain"):
        own, members = list(rows[split]), []
        for begin in range(0, len(own), SENTENCES):
            some = own[begin : begin + SENTENCES]
            text, facts = "", []
            for row in some:
                place = row["answer"].find(row["value"])
                if place > 0:
                    facts.append({"before": f"{text}{row['answer'][:place]}".rstrip(), "value": row["value"]})
                text += f"{row['answer']} "
            members.append({"text": text.rstrip(), "facts": facts})
        found[split] = Dataset.from_list(members)
    return found


def model_of(recipe: PassagesRecipe) -> Path:
    def train(folder: Path) -> None:
        rows = passages(recipe)
        texts = [*rows["forget"]["text"], *rows["retain"]["text"]]
        tokenizer = opinions.train_tokenizer(texts, 1024)
        taught = rows["retain"]["text"][:] if recipe.without_forget else texts
        settings = TRAINING | {"num_train_epochs": recipe.epochs}
        opinions.train_opinion_model(
            as_rows(taught), tokenizer, folder, size=SIZE, seed=recipe.seed, progress=False, **settings
        )
        write_recipe(recipe, folder)

    twin = "-retrained" if recipe.without_forget else ""
    name = f"passages-{recipe.people}-{recipe.data_seed}{twin}-{recipe.seed}"
    return cached(name, recipe, train, progress=False)


def as_rows(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"text": texts})


def logits_of(model: nn.Module, rows: list[list[int]]) -> list[Tensor]:
    found = []
    with torch.no_grad():
        for begin in range(0, len(rows), 16):
            some = rows[begin : begin + 16]
            logits = model(**as_inputs(some, model.device)).logits
            found += [own[: len(ids)] for own, ids in zip(logits, some, strict=True)]
    return found


class With(UnlearnSFTTrainer):
    """`UnlearnSFTTrainer` with one of TARGETS.

    Args:
        targets (`str`): which.
        reinforced (`PreTrainedModel`, *optional*): the original after more training on the forget passages, for the targets that ask it.
    """

    def __init__(self, *args, targets: str, reinforced: PreTrainedModel | None = None, **kwargs):
        self.wanted, self.reinforced = targets, reinforced
        super().__init__(*args, **kwargs)

    def _made(self) -> dict[str, Asked]:
        made, pairs = super()._made(), of_forget_rows(self.forget_dataset, self.subjects)
        if self.wanted == "redirect":
            return made
        if self.wanted == "own tokens taken away":
            pairs = [replace(pair, other=None) for pair in pairs]
        elif self.wanted != "sentence by sentence":
            pairs = [replace(pair, sentences=()) for pair in pairs]
        asked = ask(self.model, pairs)
        if self.wanted in REINFORCES:
            asked = Asked(asked.rows, self._generic(pairs, asked.targets))
        return made | {"asked": asked}

    def _generic(self, pairs: list[Pair], targets: Targets) -> Targets:
        """Equation 1 at every place; of *both* where somebody else's passage has the same token."""
        generic = self._taken_away([pair.ids for pair in pairs])
        if self.wanted == "both":
            theirs = self._taken_away([pair.other for pair in pairs])
            for pair, logits, others in zip(pairs, generic, theirs, strict=True):
                for place, there in enumerate(pair.places):
                    if place and there > 0 and pair.other[there] == pair.ids[place]:
                        logits[place - 1] = others[there - 1]
        rows = [
            logits[[place - 1 for place, label in enumerate(pair.labels) if label != IGNORED and place]]
            for pair, logits in zip(pairs, generic, strict=True)
        ]
        return Targets(targets.begins, *likeliest(torch.cat(rows)), targets.answer_log_p)

    def _taken_away(self, rows: list[list[int]]) -> list[Tensor]:
        pairs = zip(*(logits_of(model.eval(), rows) for model in (self.model, self.reinforced)), strict=True)
        return [z - ALPHA * (more - z).clamp(min=0) for z, more in pairs]


def figures(model: PreTrainedModel, tokenizer, rows: dict[str, Dataset]) -> dict[str, float]:
    """Shares of the facts that the likeliest words tell where a passage is broken off before them, and probabilities of the passages."""

    out = {}
    for name, split in rows.items():
        facts = [fact for row in split["facts"] for fact in row][:400]
        asked = [
            tokenizer(tokenizer.bos_token + fact["before"], add_special_tokens=False)["input_ids"] for fact in facts
        ]
        said = greedy_answers(model.eval(), tokenizer, asked, max_new_tokens=12, batch_size=64)
        hits = [fact["value"] in text for fact, text in zip(facts, said, strict=True)]
        evaluation = LanguageEvaluation(split.select_columns("text"), tokenizer, max_new_tokens=0)(model)
        out |= {name: sum(hits) / len(hits), f"{name}_loss": float(evaluation.nll.mean())}
        if name == "forget":
            out["said"] = [text.split(".")[0] for text in said[:4]]
    return out


def measure(recipe: PassagesRecipe, wanted: tuple[str, ...] = TARGETS, **settings) -> list[dict]:
    folder, rows = model_of(recipe), passages(recipe)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def loaded(where: Path = folder) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(where)

    found = [{"targets": "original"} | figures(loaded(), tokenizer, rows)]
    found.append(
        {"targets": "retrained"} | figures(loaded(model_of(replace(recipe, without_forget=True))), tokenizer, rows)
    )
    given = {f"{name}_dataset": as_rows(split["text"][:]) for name, split in rows.items()}
    with tempfile.TemporaryDirectory() as scratch:
        reinforced = None
        if {*REINFORCES} & {*wanted}:
            reinforced = loaded()
            sft(
                reinforced, given["forget_dataset"], f"{scratch}/more", tokenizer, seed=recipe.seed, **REINFORCED
            ).train()
        for targets in wanted:
            args = UnlearnSFTConfig(f"{scratch}/{targets}", seed=recipe.seed, **QUIET | LENGTH | settings)
            trainer = With(
                loaded(), args, targets=targets, reinforced=reinforced, processing_class=tokenizer, **given
            )  # fmt: skip
            trainer.train()
            row = {"targets": targets, "steps": trainer.state.global_step} | figures(trainer.model, tokenizer, rows)
            sft(
                trainer.model, given["retain_dataset"], f"{scratch}/benign", tokenizer, seed=recipe.seed, **BENIGN
            ).train()
            row["after_benign"] = figures(trainer.model, tokenizer, {"forget": rows["forget"]})["forget"]
            found.append(row)
    return [{"seed": recipe.seed} | row for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training")
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=TARGETS, help="targets")
    parser.add_argument("--quick", action="store_true", help="few people, two steps; writes nothing")
    given = parser.parse_args()
    silence()
    for seed in [0] if given.quick else given.seeds:
        recipe = PassagesRecipe(people=20, epochs=1) if given.quick else PassagesRecipe(seed=seed)
        few = {"max_steps": 2, "own_samples": 16} if given.quick else {}
        rows = rounded(measure(recipe, tuple(given.only), **few))
        if not given.quick:
            rows = keep(RESULTS, rows, ("seed", "targets"))
    print(*map(json.dumps, rows), sep="\n")


if __name__ == "__main__":
    main()
