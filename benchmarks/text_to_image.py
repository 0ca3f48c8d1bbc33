"""Forgetting a concept of a text-to-image pipeline: closed forms and training beside a retrained pipeline, and what brings it back.

    python benchmarks/text_to_image.py [--only METHOD …] [--concept three eight red] [--seed 0 1]
    python benchmarks/text_to_image.py --tune [--only METHOD …]
    python benchmarks/text_to_image.py --report | --quick

A small Stable Diffusion draws coloured digits (`hf_unlearn.examples.text_to_image`); one digit or colour is to be forgotten. Our methods are told one
word; those that are trained on prompts are told all usual ones for the concept, and an anchor, where they take one. Learning rate and steps of
peers are chosen on another concept, within the budget below. A cell that is measured is kept in the cache and, after `--report`, in the results:
what was stopped goes on, and several processes may share the work. `--report` gathers the cells in benchmarks/results/text_to_image.json, writes
docs/benchmarks.md and draws docs/pictures/text_to_image_rows.png; what was tried and chosen is in benchmarks/results/text_to_image_tuning.json.
Pipelines are trained on first use, some 40 minutes each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import report
import text_to_image_attacks as attacks
import text_to_image_report
from diffusers import DiffusionPipeline
from generators import grid_of, start
from PIL import Image
from rows import Measured, by_line, gathered_in, high_water, rounded, save
from text_to_image_figures import (
    GUIDANCE,
    SCALES,
    SHOWN,
    STEPS,
    Case,
    Figures,
    composite,
    quick_look,
    real_pictures,
)
from text_to_image_methods import BUDGET, LOOKS, METHODS, RATES
from transformers.utils import logging as transformers_logging

from hf_unlearn.examples import attributes, text_to_image
from hf_unlearn.examples.attributes import AttributeClassifier, AttributeRecipe, attribute_classifier
from hf_unlearn.examples.cache import cache_dir
from hf_unlearn.examples.text_to_image import TextToImageRecipe, text_to_image_model
from hf_unlearn.files import write_json
from hf_unlearn.images import grid


HERE = Path(__file__).parent
RESULTS, TUNING = HERE / "results" / "text_to_image.json", HERE / "results" / "text_to_image_tuning.json"
ROWS = HERE.parent / "docs" / "pictures" / "text_to_image_rows.png"
CELLS = cache_dir() / "benchmarks" / "text_to_image"

ANCHORS = {"three": "seven", "eight": "two", "red": "green"}  # of methods that are told one, by concept
SEEDS = (0, 1)
TUNED_ON, TUNED_SEED = Case("five", "six", number=48), 0


@dataclass(frozen=True)
class Cell(Measured):
    """One pipeline that is measured."""

    method: str
    concept: str
    seed: int

    cache, results = CELLS, RESULTS

    @property
    def case(self) -> Case:
        return Case(self.concept, ANCHORS[self.concept])

    @property
    def chosen(self) -> dict | None:
        """What was chosen for a peer; None if nothing is yet."""
        return tuning().get(self.method, {}).get("chosen") if METHODS[self.method].chosen else {}

    @property
    def settings(self) -> dict:
        return METHODS[self.method].settings | (self.chosen or {})


@cache
def folder_of(seed: int, without: str | None = None) -> Path:
    return text_to_image_model(TextToImageRecipe(seed=seed, without=without))


def quietly() -> None:
    """One thread, and nothing but the benchmark's own lines."""
    start()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def quietly_loaded(folder: Path) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# What a method does, alone in its process


def changed(method: str, case: Case, settings: dict, original: Path, folder: Path) -> dict[str, float]:
    """Makes the original forget; says how long it took and how much memory, above that with the pipeline loaded."""
    pipeline = quietly_loaded(original)
    before, begin = high_water(begin=True), time.perf_counter()
    METHODS[method].change(pipeline, case, settings, folder)
    return {"seconds": time.perf_counter() - begin, "memory": high_water() - before}


def changed_alone(*given) -> dict[str, float]:
    """[`changed`] in a new process, so that nothing that came before counts."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=quietly) as pool:
        return pool.submit(changed, *given).result()


# Cells


def measure(cell: Cell, folder: Path, figures: Figures, quick: bool = False) -> dict:
    """All figures of the pipeline in a folder, which is loaded anew for what changes it."""
    case, pictures, seed = figures.case, figures.pictures["train"], cell.seed

    def loaded() -> DiffusionPipeline:
        pipeline = quietly_loaded(folder)
        return attacks.avoiding(pipeline, case.word) if cell.method == "negative_prompt" else pipeline

    steps = {"steps": 1} if quick else {}
    pipeline = loaded()
    row = figures.wordings(pipeline) | figures.others(pipeline, every=40 if quick else 1)
    row["guidance"] = figures.guidance(pipeline)
    if quick and cell.method not in ("original", "negative_prompt", "redirect"):  # once is enough
        return row
    row["after"] = {
        "benign": figures.asked(attacks.benign(loaded(), pictures, case, seed, **steps)),
        "relearnt": figures.asked(attacks.relearnt(loaded(), pictures, case, seed, **steps)),
        "embedding": figures.asked(attacks.searched(loaded(), pictures, case, seed, **steps), "embedding"),
        "img2img": figures.share(attacks.from_pictures(pipeline, pictures, case, figures.steps)),
        "negative": figures.asked(attacks.avoiding(loaded(), case.anchor)),
        "int8": figures.asked(attacks.rounded_to_int8(loaded())),
        "fp16": figures.asked(attacks.in_half_precision(loaded()), number=2 if quick else attacks.HALVES),
    }
    return row


def row_of(cell: Cell) -> tuple[dict, Image.Image | None]:
    """The cell's figures and pictures."""
    figures = Figures(cell.case, attribute_classifier(), real_pictures())
    shared = asdict(cell) | {"version": Cell.version, "settings": cell.settings}
    original = folder_of(cell.seed)
    if METHODS[cell.method].change is None:
        folder = folder_of(cell.seed, cell.concept) if cell.method == "retrained" else original
        row = measure(cell, folder, figures)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "model")
            try:
                cost = changed_alone(cell.method, cell.case, cell.settings, original, folder)
            except ValueError as error:
                return shared | {"refused": str(error)}, None
            row = cost | measure(cell, folder, figures)
    strip = figures.strip()
    return shared | row, grid(strip, columns=len(strip))


def cells(given: argparse.Namespace) -> list[Cell]:
    """What is asked for and settings are chosen for."""
    found = []
    for seed, concept, method in product(given.seed, given.concept, given.only or METHODS):
        cell = Cell(method, concept, seed)
        if cell.chosen is not None:
            found.append(cell)
        elif given.only:
            raise SystemExit(f"{method}: nothing is chosen yet; run with --tune first")
    return found


# Choosing for the peers


def tuning() -> dict:
    return json.loads(TUNING.read_text()) if TUNING.is_file() else {}


def tune(method: str) -> None:
    """Tries every option, looking after each number of steps, and writes down each when it is done."""
    from language_attacks import At

    one, folder = METHODS[method], folder_of(TUNED_SEED)
    figures = Figures(TUNED_ON, attribute_classifier(), real_pictures())
    original = quick_look(figures, quietly_loaded(folder))
    values = dict(one.chosen)
    looks = values.pop("max_steps", ())
    for option in grid_of(values):
        tried = tuning().get(method, {}).get("tried", [])
        if any(all(row[key] == value for key, value in option.items()) for row in tried):
            continue
        pipeline, seen = quietly_loaded(folder), {}

        def look(model) -> dict:
            judged = type(pipeline)(**pipeline.components | {"unet": model}, requires_safety_checker=False)  # noqa: B023
            row = quick_look(figures, judged)
            return row | {"composite": composite(row, original)}

        with tempfile.TemporaryDirectory() as scratch:
            changed_to = Path(scratch, "model")
            at, steps = At(looks, look), {"max_steps": max(looks)} if looks else {}
            try:
                one.change(pipeline, TUNED_ON, one.settings | option | steps, changed_to, [at])
                seen = {step: {"max_steps": step} | row for step, row in at.seen.items()}
                if not looks:  # of a closed form
                    seen = {0: look(quietly_loaded(changed_to).unet)}
            except ValueError as error:
                seen = {
                    0: dict.fromkeys(("rest", "others", "composite"), 0.0) | {"forgotten": 1.0, "refused": str(error)}
                }
        tried += [option | row for row in seen.values()]
        every_one = len(tried) == len(grid_of(values)) * max(1, len(looks))
        best = max(tried, key=lambda row: row["composite"])
        chosen = {key: best[key] for key in one.chosen} if every_one else None
        save(TUNING, by_line(tuning() | {method: rounded({"chosen": chosen, "tried": tried})}))
        print(method, json.dumps(rounded(tried[-len(seen) :])), flush=True)


# Results


def gathered() -> dict[str, dict]:
    every = cells(argparse.Namespace(seed=SEEDS, concept=list(ANCHORS), only=None))
    return {cell.name: rounded(row) for cell in every if (row := cell.kept())}


def write_report() -> None:
    """Results, page and pictures from the cells that are there."""
    found = gathered()
    budget = BUDGET | {"rates": RATES, "looks": LOOKS, "steps": STEPS, "guidance": GUIDANCE, "scales": SCALES}
    budget |= {"tuned_on": TUNED_ON.word, "anchors": ANCHORS, "number": Case.number, "shown": SHOWN}
    budget |= {"finetuning": attacks.FINETUNING, "benign": attacks.BENIGN, "relearning": attacks.RELEARNING}
    budget |= {"few": attacks.FEW, "search": attacks.SEARCH, "strength": attacks.STRENGTH, "halves": attacks.HALVES}
    labels = {name: method.label for name, method in METHODS.items()}
    save(
        RESULTS,
        f'{{"budget": {json.dumps(budget)},\n"labels": {json.dumps(labels)},\n"cells": {by_line(found)}}}',
    )
    gathered_in.cache_clear()
    drawn = {
        name: Image.open(file)
        for name in METHODS
        if (file := Cell(name, "three", 0).file.with_suffix(".png")).is_file()
    }
    kept = text_to_image_report.read_rows(ROWS, SHOWN)
    names = {name: method.label.replace("*", "").replace("`", "") for name, method in METHODS.items()}
    strips = {shown: drawn.get(name) or kept[shown] for name, shown in names.items() if name in drawn or shown in kept}
    if strips:
        text_to_image_report.write_rows(strips, SHOWN, ROWS)
    report.write()
    print(text_to_image_report.goals(found))


def quick() -> None:
    """Everything once, with a pipeline that has learnt next to nothing."""
    recipe = TextToImageRecipe(examples=200, steps=4, reader_steps=2, vae_steps=2, checkpoints=0, channels=(8, 16))
    few = {"max_steps": 2, "per_device_train_batch_size": 2, "forget_samples": 2, "own_samples": 4}
    with tempfile.TemporaryDirectory() as scratch:
        folder = text_to_image.train(recipe, Path(scratch, "original"), progress=False)
        judge = attributes.train(AttributeRecipe(examples=200, steps=4), Path(scratch, "judge"), progress=False)
        pictures = real_pictures(400)
        for method, one in METHODS.items():
            case = Case("red", "green", number=2) if method == "redirect" else Case("three", "seven", number=2)
            figures = Figures(case, AttributeClassifier.from_pretrained(judge), pictures, steps=2)
            cell, row = Cell(method, case.word, 0), {}
            try:
                made = folder
                if one.change is not None:
                    made = Path(scratch, method)
                    settings = one.settings | (few if one.is_trained else {})
                    row = changed(method, case, settings, folder, made)
                row |= measure(cell, made, figures, quick=True)
            except (ImportError, ValueError) as error:
                row = {"refused": str(error)}
            print(cell.name, json.dumps(rounded(row)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=METHODS, help="methods")
    parser.add_argument("--concept", nargs="+", choices=ANCHORS, default=list(ANCHORS))
    parser.add_argument("--seed", nargs="+", type=int, choices=SEEDS, default=SEEDS, help="of the pipeline's training")
    parser.add_argument("--again", action="store_true", help="measure cells that are in the cache, too")
    parser.add_argument("--tune", action="store_true", help="choose the settings of peers")
    parser.add_argument("--report", action="store_true", help="write results and page from the cells in the cache")
    parser.add_argument("--quick", action="store_true", help="with an untrained pipeline: two minutes; writes nothing")
    given = parser.parse_args()
    quietly()
    if given.quick:
        return quick()
    if given.report:
        return write_report()
    if given.tune:
        for method in given.only or METHODS:
            if METHODS[method].chosen:
                try:
                    tune(method)
                except ImportError as error:
                    print(f"{method}: {error}", flush=True)
        return None
    for cell in cells(given):
        if given.again or not cell.kept():
            began = time.perf_counter()
            try:
                row, strip = row_of(cell)
            except ImportError as error:
                print(f"{cell.name}: {error}", flush=True)
                continue
            write_json(row, cell.file)
            if strip is not None:
                strip.save(cell.file.with_suffix(".png"))
            shown = row.get("refused") or f"{row['asked']:.3f} {row['others']:.3f}"
            print(f"{cell.name}: {shown} ({time.perf_counter() - began:.0f} s)", flush=True)
    return None


if __name__ == "__main__":
    main()
