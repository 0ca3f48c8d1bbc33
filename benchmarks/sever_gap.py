"""How low a closed row should lie: what models that never saw a class give it on its images, beside what rules make of the original alone.

    python benchmarks/sever_gap.py [--quick] [--only digits fashion_mnist "four digits"]

`sever` closes a class's row of the head: what remains of the class is one number, the log-odds of its label to all kept classes on the forget images. A retrained
model has a law of it; an unlearned one has what `sever` makes of the original, the lower of −log-odds of the label and of the least likely kept class (there of the
unlearned model's, which is asked for the original's). Small ResNets (`examples/classifier.py`) of digits and of 5,000 images of
Fashion-MNIST, trained for few and many epochs, without one of three classes by three seeds each. Rows go to benchmarks/results/sever_gap.json as they are found.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
from datasets import Dataset
from rows import keep, rounded
from scipy.special import logsumexp
from transformers.utils import logging as transformers_logging

from hf_unlearn.data import split_by_values
from hf_unlearn.examples import classifier
from hf_unlearn.examples.classifier import digits_processor, predict, train_classifier
from hf_unlearn.examples.datasets import digits, fashion_mnist


RESULTS = Path(__file__).parent / "results" / "sever_gap.json"
EPOCHS = {"digits": (3, 15, 60), "fashion_mnist": (2, 10), "four digits": (5, 30)}
CLASSES, SEEDS = (0, 3, 8), (0, 1, 2)  # the original has the first seed
FOUR = (0, 1, 2, 3)


def rows_of(data: str) -> Dataset:
    if data == "fashion_mnist":
        return fashion_mnist()["train"].select(range(5_000))
    rows = digits()["train"]
    return rows if data == "digits" else split_by_values(rows, "label", FOUR)[0]


def trained(rows: Dataset, seed: int, epochs: int):
    with tempfile.TemporaryDirectory() as folder:
        return train_classifier(rows, Path(folder, "model"), seed=seed, progress=False, num_train_epochs=epochs)


def log_odds(model, rows: Dataset, forgotten: int) -> tuple[float, float]:
    """Means over the images of the log-odds of their label, and of the least likely kept class, to all kept ones."""
    logits = predict(model, digits_processor(), rows).astype(float)
    kept = np.delete(logits, forgotten, axis=1)
    all_kept = logsumexp(kept, axis=1)
    return float((logits[:, forgotten] - all_kept).mean()), float((kept.min(1) - all_kept).mean())


def measured(data: str, epochs: int, classes: tuple[int, ...], seeds: tuple[int, ...]) -> list[dict]:
    rows = rows_of(data)
    if data == "four digits":
        classes = tuple(one for one in classes if one in FOUR)
    original = trained(rows, seeds[0], epochs)
    found = []
    for forgotten in classes:
        forget, kept = split_by_values(rows, "label", [forgotten])
        known, least = log_odds(original, forget, forgotten)
        never = [log_odds(trained(kept, seed, epochs), forget, forgotten)[0] for seed in seeds]
        found.append(
            {
                "data": data, "epochs": epochs, "class": forgotten, "classes": original.config.num_labels, "original": known, "least": least,
                "rule": min(-known, least), "retrained": never,
            }
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="digits, three epochs, one class: writes nothing")
    parser.add_argument("--only", nargs="+", choices=list(EPOCHS), default=list(EPOCHS))
    quick, only = (given := parser.parse_args()).quick, given.only
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for data, epochs in [(name, one) for name in only for one in EPOCHS[name]]:
        with patch.object(
            classifier, "CLASSES", classifier.CLASSES[: len(FOUR)] if data == "four digits" else classifier.CLASSES
        ):
            found = measured(data, epochs, CLASSES[:1] if quick else CLASSES, SEEDS[:2] if quick else SEEDS)
        for row in found:
            print(rounded(row), flush=True)
        if quick:
            return
        keep(RESULTS, [rounded(row) for row in found], ("data", "epochs", "class"))


if __name__ == "__main__":
    main()
