"""Forgetting invented people: our default beside the field's losses, refusals and a retrained model, and what brings them back.

    python benchmarks/language_unlearning.py [--only METHOD …] [--mode full lora] [--data retain forget] [--set forget10 forget05] [--seed 1 2 3]
    python benchmarks/language_unlearning.py --tune [--only METHOD …] [--mode …] [--data …]
    python benchmarks/language_unlearning.py --report | --quick

A small Llama knows 200 people by heart (`hf_unlearn.examples.facts`); 5 or 10 % of them are to be forgotten, with the rows of the
others at hand ("retain") or without ("forget"), in all weights ("full") or by an adapter ("lora"). Learning rate, weight of the retain loss
and steps are chosen for every method but our default by the composite score, on other people and another seed, within the budget
below; the default has the package's settings. A cell that is measured is kept in the cache and, after `--report`, in the results: what was stopped
goes on, and several processes may share the work. `--report` gathers the cells in benchmarks/results/language_unlearning.json and writes
docs/benchmarks.md; what was tried and chosen is in benchmarks/results/language_tuning.json. Models are trained on first use, minutes each.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import language_report
import report
from datasets import Dataset, DatasetDict, interleave_datasets
from generators import grid_of
from language_attacks import QUIET, RELEARNING, At, pruned, quantise, sft, silence
from language_figures import Figures, against, composite
from peft import LoraConfig, PeftModel
from rows import Measured, by_line, rounded, save
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_unlearn import UnlearnSFTConfig, UnlearnSFTTrainer
from hf_unlearn.examples.cache import cache_dir
from hf_unlearn.examples.facts import FactsRecipe, facts_model, kinds
from hf_unlearn.files import write_json


HERE = Path(__file__).parent
RESULTS, TUNING = HERE / "results" / "language_unlearning.json", HERE / "results" / "language_tuning.json"
CELLS = cache_dir() / "benchmarks" / "language"

RECIPE, TUNED_ON = FactsRecipe(data_seed=0), FactsRecipe(data_seed=10, seed=0)
SETS, SEEDS = {"forget10": 0.10, "forget05": 0.05}, (1, 2, 3)
MODES, DATA = ("full", "lora"), ("retain", "forget")

OURS = {"redirect": {"forget_loss": "redirect"}}  # and the package's defaults
PEERS = {  # what a method is besides PLAIN and what is chosen for it
    "refusal": {},
    "ascent": {"forget_loss": "ascent"},
    "npo": {"forget_loss": "npo"},
    "simnpo": {"forget_loss": "simnpo"},
    "undial": {"forget_loss": "undial"},
    "wga": {"forget_loss": "wga"},
    "satimp": {"forget_loss": "satimp"},
    "ceu": {"forget_loss": "ceu"},
    "idkdpo": {"forget_loss": "idkdpo"},
    "altpo": {"forget_loss": "altpo"},
    "rmu": {"forget_loss": "rmu"},
    "pdu": {"forget_loss": "pdu"},
}
NEEDS_RETAIN = ("pdu",)
METHODS = ("original", "retrained", *OURS, *PEERS)
# The budget of a peer is that of our defaults: at most so many steps of so many rows to forget and, where there are any, so many times as
# many to keep. Nothing of ours is beside its loss.
STEPS = (25, 50, 100, 200, 400)
ROWS, KEPT = UnlearnSFTConfig.per_device_train_batch_size, UnlearnSFTConfig.retain_per_forget
PLAIN = {
    "per_device_train_batch_size": ROWS, "retain_per_forget": KEPT, "lr_scheduler_type": "constant", "replay_weight": 0.0,
    "isotropic_weight": 0.0, "guard": False,
}  # fmt: skip
GRID = {"learning_rate": (3e-4, 1e-3), "retain_weight": (1.0, 5.0)}
GRIDS = {"rmu": {"rmu_layer": (1, 3)}}  # what else there is to choose
RATES = {"full": (5e-4, 1e-3, 2e-3), "lora": (4e-3, 2e-3, 1e-3)}  # for our default, which is one for all models
ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
ADAPTER_RATES = 5  # times the learning rates of GRID
REFUSALS = (
    "I don't know.", "I am not sure about that.", "I have no information about this person.", "Sorry, I cannot answer that.",
    "That is something I never learnt.",
)  # fmt: skip
RELEARNT = (30, 100)  # steps
LOOKED = 80  # rows of a split while tuning, at most


@dataclass(frozen=True)
class Cell(Measured):
    """One model that is measured."""

    method: str
    mode: str
    data: str
    set: str
    seed: int

    cache, results = CELLS, RESULTS

    @property
    def recipe(self) -> FactsRecipe:
        return replace(RECIPE, share=SETS[self.set], seed=self.seed)

    @property
    def chosen(self) -> dict | None:
        """What was chosen for a peer; None if nothing is yet."""
        return tuning().get(f"{self.method} {self.mode} {self.data}", {}).get("chosen")

    @property
    def settings(self) -> dict | None:
        """Of the method's config; None for what is not unlearnt."""
        return PLAIN | PEERS[self.method] | self.chosen if self.method in PEERS else OURS.get(self.method)


# Models


@cache
def data_of(recipe: FactsRecipe) -> DatasetDict:
    return recipe.data()


@cache
def folder_of(recipe: FactsRecipe) -> Path:
    """The original is one for all sets: who is to be forgotten changes nothing of what is learnt."""
    return facts_model(recipe if recipe.without_forget else replace(recipe, share=FactsRecipe.share), progress=False)


@cache
def figures_of(recipe: FactsRecipe, limit: int = 200) -> Figures:
    return Figures(data_of(recipe), AutoTokenizer.from_pretrained(folder_of(recipe)), REFUSALS, limit)


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def refusing(rows: DatasetDict, data: str, seed: int) -> Dataset:
    """The questions that are to be forgotten, with refusals, and KEPT times as many of the retained rows."""
    answered = rows["forget"].map(
        lambda row: {"completion": [{"role": "assistant", "content": REFUSALS[row["id"] % len(REFUSALS)]}]}
    )
    if data == "forget":
        return answered
    return interleave_datasets(
        [answered, rows["retain"]], [1 / (1 + KEPT), KEPT / (1 + KEPT)], seed, stopping_strategy="all_exhausted"
    )


def alternates(rows: DatasetDict, seed: int) -> list[str]:
    """Plausible other answers, which a model of this size does not write when asked to: the same words, with what is true of a retained
    person.
    """
    rng, known = random.Random(seed), {kind: [] for kind in kinds()}
    for kind, value in zip(rows["retain"]["kind"], rows["retain"]["value"], strict=True):
        known[kind].append(value)
    others = [rng.choice([value for value in known[row["kind"]] if value != row["value"]]) for row in rows["forget"]]
    return [row["answer"].replace(row["value"], other) for row, other in zip(rows["forget"], others, strict=True)]


def unlearn(
    recipe: FactsRecipe, method: str, mode: str, data: str, settings: dict, folder: Path, at: At | None = None
) -> dict:
    """Writes the model that forgot into `folder`; says how long it took."""
    rows, model = data_of(recipe), loaded(folder_of(recipe))
    tokenizer = AutoTokenizer.from_pretrained(folder_of(recipe))
    peft_config = LoraConfig(**ADAPTER) if mode == "lora" else None
    shared = {"peft_config": peft_config, "callbacks": [at] if at else None}
    with tempfile.TemporaryDirectory() as scratch:
        if method == "refusal":
            rows_a_step = settings["per_device_train_batch_size"] * (1 + KEPT if data == "retain" else 1)
            given = {name: settings[name] for name in ("learning_rate", "lr_scheduler_type", "max_steps")}
            given |= {"per_device_train_batch_size": rows_a_step}
            taught = refusing(rows, data, recipe.seed)
            trainer = sft(model, taught, scratch, tokenizer, seed=recipe.seed, **given, **shared)
        else:
            args = UnlearnSFTConfig(scratch, seed=recipe.seed, **(QUIET | settings))
            columns = ["id", "prompt", "completion"]
            retain = rows["retain"].select_columns(columns) if data == "retain" else None
            forget = rows["forget"].select_columns(columns)
            if method == "altpo":
                forget = forget.add_column("alternate", alternates(rows, recipe.seed))
            trainer = UnlearnSFTTrainer(
                model, args, forget_dataset=forget, retain_dataset=retain, processing_class=tokenizer, **shared
            )
        began = time.perf_counter()
        trainer.train()
        cost = {"seconds": time.perf_counter() - began, "steps": trainer.state.global_step}
    model = trainer.model.merge_and_unload() if isinstance(trainer.model, PeftModel) else trainer.model
    model.save_pretrained(folder)
    return cost


# Cells


def measure(
    cell: Cell, recipe: FactsRecipe, settings: dict | None, figures: Figures, relearnt=RELEARNT, samples: int = 20
) -> dict:
    """All figures of one cell, from the folder that its method wrote, loaded anew for every attack."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, cost = Path(scratch), {}
        if settings is None:
            folder = folder_of(replace(recipe, without_forget=cell.method == "retrained"))
        else:
            cost = unlearn(recipe, cell.method, cell.mode, cell.data, settings, folder)
        row = (
            asdict(cell)
            | {"version": Cell.version, "settings": settings}
            | cost
            | figures(loaded(folder), samples=samples)
        )
        row["after"] = attacked(folder, figures, cell.seed, relearnt)
    return row


def attacked(folder: Path, figures: Figures, seed: int, relearnt: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """What is known after each attack."""
    forget = figures.data["forget"]
    five = forget.select(range(0, len(forget), len(kinds()) + 1)[:5])  # of each person another fact
    after = {
        "4 bits": figures.facts(quantise(loaded(folder))),
        "10 % pruned": figures.facts(pruned(loaded(folder), 0.1)),
        "20 % pruned": figures.facts(pruned(loaded(folder), 0.2)),
    }
    for name, rows in (("retained", figures.data["retain"]), ("unrelated", figures.data["general"]), ("five", five)):
        known = tuple(five["id"]) if name == "five" else ()
        at = At(relearnt, lambda model, known=known: figures.facts(model, without=known))
        with tempfile.TemporaryDirectory() as scratch:
            settings = RELEARNING | {"max_steps": max(relearnt), "seed": seed}
            sft(loaded(folder), rows, scratch, figures.tokenizer, callbacks=[at], **settings).train()
        after |= {f"{steps} {name}": seen for steps, seen in at.seen.items()}
    return after


def fits(method: str, data: str) -> bool:
    return data == "retain" or method not in NEEDS_RETAIN


def cells(given: argparse.Namespace) -> list[Cell]:
    """What is asked for and settings are chosen for; what is not unlearnt is the same with every mode and all data."""
    found = []
    for seed, chosen, data, mode, method in product(
        given.seed, given.set, given.data, given.mode, given.only or METHODS
    ):
        cell = Cell(method, mode, data, chosen, seed)
        if method in ("original", "retrained"):
            found.append(replace(cell, mode="full", data="retain"))
        elif fits(method, data) and (method in OURS or cell.chosen):
            found.append(cell)
        elif fits(method, data) and given.only:
            raise SystemExit(f"{method}: nothing is chosen yet for {mode}, {data}; run with --tune first")
    return list(dict.fromkeys(found))


# Choosing for the peers


def tuning() -> dict:
    return json.loads(TUNING.read_text()) if TUNING.is_file() else {}


def options(method: str, mode: str, data: str) -> list[dict]:
    if method in OURS:
        return grid_of({"learning_rate": RATES[mode]})
    grid = GRID | GRIDS.get(method, {})
    if mode == "lora":
        grid["learning_rate"] = tuple(ADAPTER_RATES * rate for rate in grid["learning_rate"])
    if data == "forget" or method == "refusal":
        grid.pop("retain_weight")
    return rounded(grid_of(grid))


def hopeless(tried: list[dict], seen: dict[int, dict], steps: int) -> bool:
    """Whether a run is not gone on with; of what was tried before it, and of its own looks by step."""
    now = seen[steps]
    before = [row["composite"] for row in tried if row["max_steps"] == steps >= 50]
    worse = bool(before) and now["composite"] < statistics.median(before)
    latest = max((step for step in seen if step < steps), default=0)
    # One attack that tells all of them is enough for a composite of 0, which says nothing of the way there.
    stuck = steps >= 100 and 0 < now["composite"] <= seen[latest]["composite"]
    return now["utility"] < 0.5 or worse or stuck


def tune(method: str, mode: str, data: str) -> None:
    """Tries every option, looking at the composite after each number of STEPS, and writes down each when it is done. A run that has
    lost half of the utility, or from 50 steps on is below the median of those before it after as many, or from 100 steps on no longer
    gets better, is not gone on with.
    """
    name, figures = f"{method} {mode} {data}", figures_of(TUNED_ON, LOOKED)
    original, retrained = (judge(replace(TUNED_ON, without_forget=without)) for without in (False, True))

    def look(model: PreTrainedModel) -> dict:
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            return dict.fromkeys(("composite", "utility", "forgotten", "kept"), 0.0)
        seen = figures(model)
        return composite(seen, retrained, original) | {key: seen[key] for key in ("forgotten", "kept")}

    every = options(method, mode, data)
    for option in every:
        tried = tuning().get(name, {}).get("tried", [])
        if any(all(row[key] == value for key, value in option.items()) for row in tried):
            continue

        at = At(STEPS, look, partial(hopeless, tried))
        with tempfile.TemporaryDirectory() as scratch:
            if method in OURS:  # as many steps as it chooses; written down, and not taken by itself
                steps = unlearn(TUNED_ON, method, mode, data, OURS[method] | option, Path(scratch))["steps"]
                at.seen[steps] = look(loaded(Path(scratch)))
            else:
                settings = PLAIN | PEERS[method] | option | {"max_steps": max(STEPS)}
                unlearn(TUNED_ON, method, mode, data, settings, Path(scratch), at)
        tried += [option | {"max_steps": steps} | seen for steps, seen in at.seen.items()]
        # Of composites of 0 the one that is nearest to something, and not an untouched model.
        best = max(tried, key=lambda row: (row["composite"], row["memorisation"] * row["utility"], row["utility"]))
        chosen = {key: best[key] for key in (*option, "max_steps")} if option == every[-1] else None
        save(TUNING, by_line(tuning() | {name: rounded({"chosen": chosen, "tried": tried})}))
        print(name, json.dumps(tried[-len(at.seen) :]), flush=True)


@cache
def judge(recipe: FactsRecipe) -> dict:
    return figures_of(replace(recipe, without_forget=False), LOOKED)(loaded(folder_of(recipe)))


# Results


def gathered() -> dict[str, dict]:
    """The cells that are in the cache, with what needs the original and the retrained model of the same people and seed."""
    found = {}
    for cell in cells(argparse.Namespace(seed=SEEDS, set=list(SETS), data=DATA, mode=MODES, only=None)):
        original, retrained = (
            replace(cell, method=method, mode="full", data="retain").kept() for method in ("original", "retrained")
        )
        row = cell.kept()
        if row and original and retrained:
            row |= against(row, retrained, original)
            found[cell.name] = rounded(row)
    return found


def quick() -> None:
    """Everything once, on few people who are hardly known."""
    recipe, rows = FactsRecipe(people=20, general=40, epochs=1, seed=1), []
    figures = figures_of(recipe, limit=8)
    for method, mode, data in (
        ("original", "full", "retain"), ("retrained", "full", "retain"), ("refusal", "full", "retain"),
        ("npo", "lora", "forget"), *((method, "full", "retain") for method in OURS),
    ):  # fmt: skip
        settings = OURS.get(method) or (PLAIN | {"learning_rate": 1e-3} | PEERS[method] if method in PEERS else None)
        settings = settings and settings | {"max_steps": 2} | ({"own_samples": 16} if method in OURS else {})
        rows.append(measure(Cell(method, mode, data, "forget10", 1), recipe, settings, figures, (1, 2), 2))
        rows[-1] |= against(rows[-1], rows[min(1, len(rows) - 1)], rows[0])
        print(json.dumps(rounded({key: value for key, value in rows[-1].items() if key != "ratios"})), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=METHODS, help="methods")
    for name, values in (("mode", MODES), ("data", DATA), ("set", list(SETS)), ("seed", SEEDS)):
        parser.add_argument(f"--{name}", nargs="+", choices=values, default=values, type=type(values[0]))
    parser.add_argument("--again", action="store_true", help="measure cells that are in the cache, too")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="choose the settings of peers; with --only redirect, try rates for our default",
    )
    parser.add_argument("--report", action="store_true", help="write results and page from the cells in the cache")
    parser.add_argument("--quick", action="store_true", help="two steps on few people: two minutes; writes nothing")
    given = parser.parse_args()
    silence()
    if given.quick:
        return quick()
    if given.report:
        budget = {
            "steps": STEPS,
            "rows": ROWS,
            "kept": KEPT,
            "grid": GRID,
            "adapter": ADAPTER,
            "adapter_rates": ADAPTER_RATES,
        }
        budget |= {"relearning": RELEARNING}
        save(RESULTS, f'{{"budget": {json.dumps(budget)},\n"cells": {by_line(gathered())}}}')
        report.write()
        return print(*(language_report.goals(gathered(), mode) for mode in given.mode), sep="\n\n")
    if given.tune:
        for data, mode, method in product(given.data, given.mode, given.only or PEERS):
            if method in (*OURS, *PEERS) and fits(method, data):
                tune(method, mode, data)
        return None
    for cell in cells(given):
        if given.again or not cell.kept():
            began = time.perf_counter()
            row = measure(cell, cell.recipe, cell.settings, figures_of(cell.recipe))
            write_json(row, cell.file)
            print(
                f"{cell.file.stem}: {row['forgotten']:.3f} {row['kept']:.3f} ({time.perf_counter() - began:.0f} s)",
                flush=True,
            )
    return None


if __name__ == "__main__":
    main()
