"""What an audit says of language models whose truth is known: planted cases, methods, and one more retrained model.

    python benchmarks/audit_language.py [--seeds 3] [--only CASE …] [--quick]

A small Llama knows 200 people by heart (`hf_unlearn.examples.facts`), and 20 of them were to be forgotten: by nothing, by learning to refuse, by NPO, by our
default, by retraining without them. Five retrained models are the references of all seeds. Peers have the settings that benchmarks/language_unlearning.py chose.
Verdicts and values go to benchmarks/results/audit_language.json. Models are kept in ~/.cache/hf_unlearn, what checks read of them in its benchmarks/audit_language.
Retrained and original models take 15 minutes each on one core, on first use.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from audit_power import row_of
from language_attacks import silence
from language_unlearning import OURS, PEERS, PLAIN, data_of, folder_of, loaded, tuning, unlearn
from rows import keep, rounded
from transformers import AutoTokenizer

from hf_unlearn.audit.report import AuditReport
from hf_unlearn.audit.run import audit
from hf_unlearn.examples.cache import cache_dir
from hf_unlearn.examples.facts import FactsRecipe


RESULTS = Path(__file__).parent / "results" / "audit_language.json"
FOLDER = cache_dir() / "benchmarks" / "audit_language"
# The verdict that is right by construction; None where it is to be found out.
CASES = {"original": "not forgotten", "refusal": "suppressed", "npo": None, "redirect": None, "retrained": "forgotten"}
REFERENCES = 5
QUICK = ("answer", "answer_begun", "probability", "quantised")  # checks
FIRST = 100  # seed of the first reference; cases have those from 0 on


def retrained(recipe: FactsRecipe, seed: int) -> Path:
    return folder_of(replace(recipe, without_forget=True, seed=seed))


def made(recipe: FactsRecipe, case: str, settings: dict) -> Path:
    """Folder of the model of a case, made on first use."""
    if case == "original":
        return folder_of(recipe)
    if case == "retrained":
        return retrained(recipe, recipe.seed)
    folder = FOLDER / f"people-{recipe.people}" / f"{case}-{recipe.seed}"
    if not (folder / "config.json").is_file():
        unlearn(recipe, case, "full", "retain", settings, folder)
    return folder


def settings_of(case: str) -> dict:
    """Our defaults, or what was chosen for a peer."""
    return OURS.get(case) or PLAIN | PEERS[case] | tuning()[f"{case} full retain"]["chosen"]


def audited(recipe: FactsRecipe, model: Path, references: int, checks: str | Sequence[str]) -> AuditReport:
    rows, original = data_of(recipe), folder_of(recipe)
    return audit(
        loaded(model),
        str(original),
        [str(retrained(recipe, FIRST + number)) for number in range(references)],
        rows["forget"],
        rows["retain"],
        rows["held_out"],
        checks=checks,
        output_dir=FOLDER / f"people-{recipe.people}" / "read",
        processing_class=AutoTokenizer.from_pretrained(original),
    )


def run(
    recipe: FactsRecipe, cases: list[str], seeds: int, references: int, checks: str | Sequence[str], **overrides
) -> Iterator[dict]:
    for seed in range(seeds):
        for case in cases:
            one, began = replace(recipe, seed=seed), time.perf_counter()
            planted = case in ("original", "retrained")
            model = made(one, case, {} if planted else settings_of(case) | overrides)
            report = audited(one, model, references, checks)
            row = row_of(report, case, seed, None)
            row |= {"seconds": report.seconds, "estimated": report.estimated_seconds, "right": CASES[case]}
            print(f"seed {seed}: {case:10} {report.verdict} ({time.perf_counter() - began:.0f} s)", flush=True)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), help="cases")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few people who are hardly known, four checks: two minutes; writes nothing",
    )
    given = parser.parse_args()
    silence()
    if given.quick:
        recipe = FactsRecipe(people=20, general=40, epochs=1)
        for _ in run(recipe, ["original", "refusal", "retrained"], 1, 3, QUICK, max_steps=2):
            pass
        return
    for row in run(FactsRecipe(), given.only, given.seeds, REFERENCES, "standard"):
        keep(RESULTS, [rounded(row)], ("case", "seed"))


if __name__ == "__main__":
    main()
