"""Ten requests one after the other, of 2 % of the people each: what is known of all who asked, of the first, and of those who did not.

    python benchmarks/language_requests.py [--data retain forget] [--seed 1] [--quick]

Two ways, both with the defaults of `UnlearnSFTTrainer`: *one after the other*, each run begins with the model that the one before left and
is told of the new request only; *from the original*, each run begins with the first original and is told of all requests so far. A
request that is done is written into benchmarks/results/language_requests.json, and not done again while the cache has its model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from language_attacks import QUIET, silence
from language_unlearning import CELLS, DATA, RECIPE, REFUSALS, Figures, data_of, folder_of, loaded
from rows import keep, rounded
from transformers import AutoTokenizer

from hf_unlearn import UnlearnSFTConfig, UnlearnSFTTrainer
from hf_unlearn.examples.facts import kinds, known_share


RESULTS = Path(__file__).parent / "results" / "language_requests.json"
REQUESTS, SHARE = 10, 0.02
FROM_ORIGINAL = (10,)  # after so many requests: a run costs the same whatever came before
NAMES = ("way", "data", "seed", "requests")  # of a row
COLUMNS = ["id", "prompt", "completion"]


class Requests:
    """Data and models of one training seed.

    Args:
        seed (`int`): of the training.
        data (`str`): `"retain"` or `"forget"`: whether the rows of those who never asked are at hand.
        requests (`int`): how many.
    """

    def __init__(self, seed: int, data: str, requests: int = REQUESTS, **recipe):
        self.recipe = replace(RECIPE, share=requests * SHARE, seed=seed, **recipe)
        self.data, self.seed, self.original = data, seed, folder_of(self.recipe)
        self.rows, self.tokenizer = data_of(self.recipe), AutoTokenizer.from_pretrained(self.original)
        forget = self.rows["forget"]
        size = len(forget) // requests // len(kinds()) * len(kinds())
        self.of = [forget.select(range(size * number, size * (number + 1))) for number in range(requests)]
        self.figures = Figures(self.rows, self.tokenizer, REFUSALS)

    def unlearn(self, folder: Path, forget: Dataset, out: Path, **settings) -> float:
        """Writes the model that forgot; seconds."""
        retain = self.rows["retain"].select_columns(COLUMNS) if self.data == "retain" else None
        with tempfile.TemporaryDirectory() as scratch:
            trainer = UnlearnSFTTrainer(
                loaded(folder), UnlearnSFTConfig(scratch, seed=self.seed, **(QUIET | settings)),
                forget_dataset=forget.select_columns(COLUMNS), retain_dataset=retain, processing_class=self.tokenizer,
            )  # fmt: skip
            began = time.perf_counter()
            trainer.train()
        trainer.model.save_pretrained(out)
        return time.perf_counter() - began

    def known(self, folder: Path, done: int) -> dict[str, float]:
        """After so many requests."""
        model, kept = loaded(folder), self.figures.asked["kept"]

        def share(rows: Dataset) -> float:
            return known_share(model, self.tokenizer, rows, batch_size=128)

        every = [share(rows) for rows in self.of[: max(done, 1)]]
        return {
            "forgotten": sum(every) / len(every),
            "first": every[0],
            "newest": every[-1],
            "kept": share(kept),
            "general_loss": float(self.figures.general_held_out(model).nll.mean()),
        }


def tell(row: dict) -> None:
    """Writes a row into the results."""
    row = rounded(row)
    keep(RESULTS, [row], NAMES, key=itemgetter(*NAMES))
    print(json.dumps(row), flush=True)


def measure(case: Requests, folder: Path, write, steps: tuple[int, ...] = FROM_ORIGINAL, **settings) -> None:
    shared = {"data": case.data, "seed": case.seed}
    write({"way": "original"} | shared | {"requests": 0} | case.known(case.original, 0))
    before = case.original
    for number, rows in enumerate(case.of, 1):
        now = folder / f"requests-{case.data}-{case.seed}-{number}"
        if not (now / "config.json").is_file():
            seconds = case.unlearn(before, rows, now, **settings)
            done = {"way": "one after the other"} | shared | {"requests": number, "seconds": seconds}
            write(done | case.known(now, number))
        before = now
    for number in steps:
        now = folder / f"requests-{case.data}-{case.seed}-{number}-of-original"
        if not (now / "config.json").is_file():
            seconds = case.unlearn(case.original, concatenate_datasets(case.of[:number]), now, **settings)
            done = {"way": "from the original"} | shared | {"requests": number, "seconds": seconds}
            write(done | case.known(now, number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=DATA, default=["retain"], help="what is at hand")
    parser.add_argument("--seed", nargs="+", type=int, default=[1], help="of training")
    parser.add_argument("--quick", action="store_true", help="two requests of two steps on few people; writes nothing")
    given = parser.parse_args()
    silence()
    if given.quick:
        case = Requests(1, "retain", 2, people=50, general=40, epochs=1)
        with tempfile.TemporaryDirectory() as folder:
            return measure(case, Path(folder), print, steps=(2,), max_steps=2, own_samples=16)
    for data in given.data:
        for seed in given.seed:
            case = Requests(seed, data)
            measure(case, CELLS, tell)
    return None


if __name__ == "__main__":
    main()
