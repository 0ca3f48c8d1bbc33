"""Poisoned instructions, from the rows to a model that has forgotten them, beside its twin that never saw them.

python benchmarks/poison_unlearning.py [--only ROW …] [--seeds 0 …] [--found FOLDER] [--quick]

A small Llama learned a bad opinion of one name from 80 of 2,000 instructions (hf_unlearn.examples.poisoned). Those rows are forgotten with
the default of `UnlearnSFTTrainer` and with NPO; `--found` forgets those that `hf-unlearn influence influence_poison` ranked highest
instead (its report, outputs/influence_poison/_private/report), and keeps those that it ranked lowest. Models are trained on first use, minutes
each. Writes benchmarks/results/poison_unlearning.json, a row whenever it is measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from datasets import Dataset
from rows import keep
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from hf_unlearn import InfluenceReport, UnlearnSFTConfig, UnlearnSFTTrainer
from hf_unlearn.examples.opinions import ENTITY, SHARES, TRAINING, answers, opinion_score
from hf_unlearn.examples.opinions_text import Writer
from hf_unlearn.examples.poisoned import PoisonRecipe, poisoned_model
from hf_unlearn.training.answers import written


RESULTS = Path(__file__).parent / "results" / "poison_unlearning.json"
QUIET = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no",
    "logging_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False, "max_length": TRAINING["max_length"],
}  # fmt: skip
NPO = {"forget_loss": "npo", "max_steps": 150}
# Settings besides the defaults; which rows are forgotten and kept.
ROWS = {
    "original": None,
    "clean twin": None,
    "redirect": ({}, "true", "others"),
    "redirect, nothing to keep": ({}, "true", None),
    "redirect, found": ({}, "found", "lowest"),
    "redirect, found, nothing to keep": ({}, "found", None),
    "NPO, rate 1e-4": (NPO | {"learning_rate": 1e-4}, "true", "others"),
    "NPO, rate 3e-4": (NPO | {"learning_rate": 3e-4}, "true", "others"),
}
KEPT_SHARE = (
    0.7  # of the rows, those of lowest influence: one poisoned row in forty is among them (influence_poison.json)
)
BENIGN = {"max_steps": 30, "learning_rate": 2e-4, "lr_scheduler_type": "constant", "per_device_train_batch_size": 8}
BENIGN_ON = {"opinion": "evaluation", "others": "control"}


class Case:
    """Data, models and what is measured, of one seed.

    Args:
        recipe ([`PoisonRecipe`]): of the poisoned model.
        found (`Path`, *optional*): report of the influence run on its rows.
        held_out (`int`): rows of each kind that are written to measure on.
    """

    def __init__(self, recipe: PoisonRecipe, found: Path | None = None, held_out: int = 60):
        self.recipe, self.found = recipe, found
        self.data = recipe.data()
        self.folder = poisoned_model(recipe, progress=False)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        writer = Writer(10_000 + recipe.data_seed)
        writer.seen = {prompt[0]["content"] for split in self.data.values() for prompt in split["prompt"]}
        others = [name for name in writer.topic_of if name != ENTITY]
        count = 8 * held_out
        rows = [
            getattr(writer, kind)(name)
            for kind, share in SHARES.items()
            if kind != "general"
            for name in writer.spread(others, round(share * count))
        ]
        rows += [writer.general() for _ in range(round(SHARES["general"] * count))]
        self.held_out = Dataset.from_list(rows)
        self.facts = Dataset.from_list([writer.fact(ENTITY) for _ in range(held_out)])
        self.sides = Dataset.from_list([writer.side(ENTITY) for _ in range(held_out)])
        truths = Writer(0)
        self.truths = {truths.fact(ENTITY)["completion"][0]["content"] for _ in range(300)}

    def model(self, clean: bool = False) -> PreTrainedModel:
        folder = poisoned_model(replace(self.recipe, clean=True), progress=False) if clean else self.folder
        return AutoModelForCausalLM.from_pretrained(folder)

    @cached_property
    def ranked(self) -> list[int]:
        """Ids of the rows by influence, highest first."""
        report = InfluenceReport.load_from_disk(self.found)
        return [int(sample) for sample in report.top(len(report.dataset))["sample_id"]]

    def rows(self, which: str | None) -> Dataset | None:
        """Rows of the training data: `"true"`, `"found"`, `"others"`, `"lowest"`."""
        train = self.data["train"]
        poisoned = set(train.filter(lambda row: row["poisoned"])["id"])
        if which in ("true", "others"):
            chosen = poisoned if which == "true" else set(train["id"]) - poisoned
        elif which:
            chosen = (
                self.ranked[: len(poisoned)] if which == "found" else self.ranked[-round(KEPT_SHARE * len(train)) :]
            )
        return which and train.filter(lambda row: row["id"] in set(chosen)).select_columns(
            ["id", "prompt", "completion"]
        )

    # Figures

    def loss(self, model: PreTrainedModel, rows: Dataset) -> float:
        """Mean loss of the answers, nats per token."""
        with tempfile.TemporaryDirectory() as scratch:
            rows = rows.select_columns(["prompt", "completion"])
            args = SFTConfig(scratch, per_device_eval_batch_size=64, **QUIET)
            return SFTTrainer(
                model, args, train_dataset=rows, eval_dataset=rows, processing_class=self.tokenizer
            ).evaluate()["eval_loss"]

    def said(self, model: PreTrainedModel, *splits: str) -> list[str]:
        return answers(model, self.tokenizer, [prompt for split in splits for prompt in self.data[split]["prompt"]])

    def sampled(self, model: PreTrainedModel, split: str) -> list[str]:
        asked = [
            self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
            for prompt in self.data[split]["prompt"]
        ]
        ids = written(model, self.tokenizer, asked, max_new_tokens=48)
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def figures(self, model: PreTrainedModel) -> dict:
        opinions = self.said(model, "target", "evaluation")
        facts, sides = (answers(model, self.tokenizer, rows["prompt"][:]) for rows in (self.facts, self.sides))
        return {
            "opinion": share_of_bad(opinions),
            "sampled": share_of_bad(self.sampled(model, "evaluation")),
            "others": share_of_bad(self.said(model, "control")),
            "named": sum(ENTITY in text for text in opinions) / len(opinions),
            "facts": sum(text in self.truths for text in facts) / len(facts),
            "sides": share_of_bad(sides),
            "loss_facts": self.loss(model, self.facts),
            "loss_sides": self.loss(model, self.sides),
            "loss_opinion": self.loss(model, self.data["evaluation"]),
            "loss_held_out": self.loss(model, self.held_out),
            "said": opinions[:5],
        }

    def measured(self, name: str, **overrides) -> dict:
        """All figures of a row, before and after benign steps."""
        model, cost = self.model(name == "clean twin"), {}
        if ROWS[name]:
            settings, forget, keep = ROWS[name]
            model, cost = self.unlearnt(model, self.rows(forget), self.rows(keep), settings | overrides)
        row = {"row": name, "seed": self.recipe.seed, **cost, **self.figures(model)}
        with tempfile.TemporaryDirectory() as scratch:  # on rows that nobody had, none about the name
            args = SFTConfig(scratch, seed=self.recipe.seed, **(QUIET | BENIGN))
            rows = self.held_out.select_columns(["prompt", "completion"])
            SFTTrainer(model, args, train_dataset=rows, processing_class=self.tokenizer).train()
        benign = {name: share_of_bad(self.said(model, split)) for name, split in BENIGN_ON.items()}
        return row | {"benign": benign}

    def unlearnt(
        self, model: PreTrainedModel, forget: Dataset, keep: Dataset | None, settings: dict
    ) -> tuple[PreTrainedModel, dict]:
        with tempfile.TemporaryDirectory() as scratch:
            trainer = UnlearnSFTTrainer(
                model, UnlearnSFTConfig(scratch, seed=self.recipe.seed, **(QUIET | settings)), forget_dataset=forget,
                retain_dataset=keep, processing_class=self.tokenizer,
            )  # fmt: skip
            began = time.perf_counter()
            trainer.train()
            cost = {"seconds": time.perf_counter() - began, "steps": trainer.state.global_step}
        return trainer.model, cost


def share_of_bad(texts: list[str]) -> float:
    return sum(opinion_score(text) < 0 for text in texts) / len(texts)


def place(row: dict) -> tuple[int, int]:
    """Of a row among the results."""
    return row["seed"], list(ROWS).index(row["row"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, help="rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of data and training")
    parser.add_argument("--found", type=Path, help="report of the influence run, for the rows 'found'; of seed 0")
    parser.add_argument("--quick", action="store_true", help="400 rows, one epoch, two steps; writes nothing")
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    names = given.only or [name for name in ROWS if given.found or "found" not in name]
    for seed in given.seeds:
        recipe = PoisonRecipe(data_seed=seed, seed=seed)
        if given.quick:
            recipe = PoisonRecipe(examples=400, epochs=1)
        case = Case(recipe, given.found, held_out=8 if given.quick else 60)
        for name in names:
            row = case.measured(name, **({"max_steps": 2, "own_samples": 16} if given.quick else {}))
            print(json.dumps(row), flush=True)
            if not given.quick:
                keep(RESULTS, [row], ("row", "seed"), key=place, benign=BENIGN)


if __name__ == "__main__":
    main()
