"""FAST filters on generators of digits and of Fashion-MNIST, beside other ways to learn from marks.

The paper's protocol (arXiv 2312.14895): 10,000 samples, half of them for feedback and half for judging, n marks of each kind,
labels by a classifier; the latents are the generator's own, or what an encoder that never saw the class makes of the images.

    python benchmarks/filter.py                 # everything: about 25 minutes on two cores
    python benchmarks/filter.py --quick         # one class, few samples, nothing is written
    python benchmarks/filter.py --only promise  # one part: protocol, text, promise

What the defaults are (ridge, shrinkage) was chosen on another GAN and on real images, with other encoders.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from filter_encoders import (
    KINDS,
    SAMPLES,
    classifier_folder,
    embeddings,
    fortunes,
    samples,
    text_embeddings,
)
from filter_peers import PEERS, POOL, fine_tuned
from generators import PICTURES, images_of, judge, run, start
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict

from hf_unlearn import FASTFitter, FilteredPipeline, GANPipeline
from hf_unlearn.examples import gan as small_gan
from hf_unlearn.examples.classifier import cached_digits_classifier
from hf_unlearn.examples.datasets import load
from hf_unlearn.filtering.fitting import forms
from hf_unlearn.filtering.fitting.background import Background
from hf_unlearn.filtering.fitting.rates import release_rate, residual_rate
from hf_unlearn.filtering.fitting.thresholds import max_false_alarm, pooled_mean
from hf_unlearn.images import grey_images, grid
from hf_unlearn.metrics.features import Features, features_of
from hf_unlearn.metrics.generation import density_coverage, frechet_distance
from hf_unlearn.plots import curves


RESULTS = Path(__file__).parent / "results" / "filter.json"
TASKS = ("digits", "fashion_mnist")
MARKS = (20, 40, 60, 80, 100)
SEEDS = (0, 1, 2)
LATENTS = ("known", *KINDS)
PAPER = ("mean_difference", "linear_svc")
LINEAR = (*PAPER, "lda")
OURS = "quadratic"
SEPARATED = 0.97
FALSE_ALARM, CONFIDENCE, MAX_PREVALENCE = 0.05, 0.95, 0.15
SPLITS = 200
COMPONENTS = 64  # the default of FASTFitter; more than the encoders of images give
OPERATED = ("known", "classifier")  # latents whose filters are looked at where they draw the line
FEW = 1_500  # samples of either side for density and coverage, whose time is quadratic


def at_false_alarm(scores: np.ndarray, undesired: np.ndarray, rate: float = FALSE_ALARM) -> float:
    """Recall where so many of the clean test samples are blocked."""
    return float((scores[undesired] > np.quantile(scores[~undesired], 1 - rate)).mean())


def background(rows: np.ndarray, seed: int = 0) -> Background:
    pool = Background(rows.shape[1], keep=10_000, calibration_share=0.5, seed=seed, covariance=True)
    pool.update(rows.astype(np.float64))
    return pool


class Split:
    """One draw: half of the samples for feedback, half for judging, and the marks in the order a user finds them."""

    def __init__(self, undesired: np.ndarray, seed: int):
        order = np.random.default_rng([seed, 17]).permutation(len(undesired))
        self.feedback, self.test = order[: len(order) // 2], order[len(order) // 2 :]
        self.marked = self.feedback[undesired[self.feedback]]
        self.clean = self.feedback[~undesired[self.feedback]]
        self.undesired = undesired

    def looked_at(self, count: int) -> np.ndarray:
        """Clean samples that a user sees until `count` undesired ones are found."""
        end = int(np.flatnonzero(self.undesired[self.feedback])[count - 1])
        seen = self.feedback[:end]
        return seen[~self.undesired[seen]]


def scorers(rows: np.ndarray, split: Split, count: int, kind: str) -> dict[tuple[str, str], tuple]:
    """Every method in both modes: `(score, scores of the marks and of the clean ones for the paper's threshold)`."""
    undesired, clean = (rows[part[:count]].astype(np.float64) for part in (split.marked, split.clean))
    pool = background(rows[split.feedback])
    stand_ins = forms.pseudo_clean(undesired, pool.fitting.rows, factor=0.5 if kind == "known" else 1.0)
    unmarked = pool.fitting.rows[:POOL].astype(np.float64)
    quadratic = forms.quadratic(undesired, forms.basis_of(pool.moments, COMPONENTS))
    found = {
        (OURS, mode): (quadratic, undesired, clean if mode == "both" else stand_ins) for mode in ("both", "alone")
    }
    for mode, others in (("both", clean), ("alone", stand_ins)):
        for name in LINEAR:
            found[name, mode] = (getattr(forms, name)(undesired, others), undesired, others)
    for name, fit in PEERS.items():
        for mode, others in (("both", clean), ("alone", unmarked)):
            found[name, mode] = (fit(undesired, others), undesired, others)
    return found


@cache
def clean_features(task: str, unwanted: int, seed: int) -> tuple[Features, Features, Split]:
    """Features of a split's test half, and of what an oracle would release of it: the paper's reference."""
    _, images, classes = samples(task)
    split = Split((classes == unwanted).numpy(), seed)
    features = features_of(images[split.test], judge(task))
    return features, Features(features.values[~split.undesired[split.test]], features.extractor), split


def operated(blocked: np.ndarray, task: str, unwanted: int, seed: int) -> dict[str, float]:
    """What a filter does at its threshold."""
    features, reference, split = clean_features(task, unwanted, seed)
    undesired = split.undesired[split.test]
    prevalence, recall, alarms = undesired.mean(), blocked[undesired].mean(), blocked[~undesired].mean()
    found = {
        "recall": float(recall),
        "false_alarm": float(alarms),
        "release": release_rate(prevalence, recall, alarms),
        "residual": residual_rate(prevalence, recall, alarms),
        "prevalence": float(prevalence),
    }
    if (~blocked).sum() > 100:
        released = Features(features.values[~blocked], features.extractor)
        found["fid"] = frechet_distance(reference, released).distance
        both = density_coverage(*(Features(side.values[:FEW], side.extractor) for side in (reference, released)))
        found |= {"density": both.density, "coverage": both.coverage}
    return found


def protocol_job(job: tuple) -> dict:
    """All methods on one class of one generator."""
    task, unwanted, marks, seeds, count, tuned = job
    latents, images, classes = samples(task, count)
    undesired = (classes == unwanted).numpy()
    seen = {"known": latents.flatten(1).numpy()} | embeddings(task, unwanted, images)
    rows = []
    for seed in seeds:
        split = Split(undesired, seed)
        truth = undesired[split.test]
        for kind in LATENTS:
            for n in marks:
                if len(split.marked) < n:
                    continue
                # What a filter does where it draws the line: of the first draw only, since distances take their time.
                looked = seed == seeds[0] and n in (marks[0], marks[-1]) and kind in OPERATED and count == SAMPLES
                for (name, mode), (score, u, d) in scorers(seen[kind], split, n, kind).items():
                    values = score(seen[kind][split.test].astype(np.float64))
                    row = {"latents": kind, "method": name, "mode": mode, "n": n, "seed": seed}
                    row |= {"auc": roc_auc_score(truth, values), "recall_at_5": at_false_alarm(values, truth)}
                    if looked and name in PAPER:
                        tau = pooled_mean(score(u), score(d)).value
                        row["operating"] = operated(values > tau, task, unwanted, seed)
                    rows.append(row)
                if looked:
                    rows += promised(seen[kind], split, n, kind, (task, unwanted, seed))
        if tuned:
            folder = str(classifier_folder(task, unwanted))
            n = marks[0]
            for mode, clean in (("both", split.clean[:n]), ("alone", split.feedback)):
                values = fine_tuned(folder, images, split.marked[:n], clean, split.test, seed=seed)
                row = {"latents": "classifier", "method": "fine-tuned classifier", "mode": mode, "n": n, "seed": seed}
                rows.append(row | {"auc": roc_auc_score(truth, values), "recall_at_5": at_false_alarm(values, truth)})
    ours = [row["auc"] for row in rows if row["method"] == OURS and row["n"] == marks[0] and "auc" in row]
    return {"task": task, "class": unwanted, "rows": rows, "auc, ours, fewest marks": float(np.mean(ours))}


def promised(seen: np.ndarray, split: Split, n: int, kind: str, key: tuple) -> list[dict]:
    """Ours and the paper's forms with a bounded share of false alarms: calibrated on the clean samples that a user has looked at
    meanwhile, or on the unmarked pool.
    """
    undesired, clean = (seen[part].astype(np.float64) for part in (split.marked[:n], split.looked_at(n)))
    pool = background(seen[split.feedback])
    half = len(clean) // 2
    fits = {(OURS, "looked at"): (forms.quadratic(undesired, forms.basis_of(pool.moments, COMPONENTS)), clean, None)}
    fits[OURS, "pool"] = (fits[OURS, "looked at"][0], pool.calibration.rows.astype(np.float64), MAX_PREVALENCE)
    for name in LINEAR:  # half of the clean marks to fit to, half to calibrate on
        fits[name, "looked at"] = (getattr(forms, name)(undesired, clean[:half]), clean[half:], None)
    rows = []
    for (name, mode), (score, held, prevalence) in fits.items():
        try:
            tau = max_false_alarm(score(held), FALSE_ALARM, CONFIDENCE, max_prevalence=prevalence).value
        except ValueError:  # too few clean marks to promise anything
            continue
        values = score(seen[split.test].astype(np.float64))
        row = {"latents": kind, "method": name, "mode": mode, "n": n, "seed": key[2]}
        rows.append(row | {"operating": operated(values > tau, *key)})
    return rows


def text_job(job: tuple) -> dict:
    """All methods on one category of texts, through a sentence encoder."""
    category, marks, seeds, separation = job
    seen, numbers, names = text_embeddings()
    undesired = numbers == names.index(category)
    rows = []
    for seed in seeds:
        split = Split(undesired, seed)
        truth = undesired[split.test]
        for n in marks:
            if len(split.marked) < n:
                continue
            for (name, mode), (score, _, _) in scorers(seen, split, n, "text").items():
                values = score(seen[split.test].astype(np.float64))
                rows.append(
                    {"latents": "text", "method": name, "mode": mode, "n": n, "seed": seed}
                    | {"auc": roc_auc_score(truth, values), "recall_at_5": at_false_alarm(values, truth)}
                )
    ours = [row["auc"] for row in rows if row["method"] == OURS and row["n"] == marks[0]]
    return {
        "task": "fortunes",
        "class": category,
        "texts": int(undesired.sum()),
        "separation": separation,
        "rows": rows,
        "auc, ours, fewest marks": float(np.mean(ours)),
    }


def separated_texts() -> dict[str, float]:
    """AUC of every category by a classifier that was given all labels (logistic regression, five folds)."""
    seen, numbers, names = text_embeddings()
    chances = cross_val_predict(
        LogisticRegression(C=10.0, max_iter=2_000), seen, numbers, cv=5, method="predict_proba"
    )
    return {name: roc_auc_score(numbers == index, chances[:, index]) for index, name in enumerate(names)}


def separated_classes(task: str) -> dict[int, float]:
    """Share of each class's real held-out images that the judge recognises."""
    parts = load(task)
    rows = parts["test"]
    labels = torch.tensor(rows["label"])
    images = images_of(task, True)[0] if task == "fashion_mnist" else grey_images(rows, 8)
    found = judge(task).classify(images)
    return {c: float((found[labels == c] == c).float().mean()) for c in range(10)}


def promise_job(job: tuple) -> dict:
    """How often the promise is kept: random marks and calibration samples, false alarms counted on all other clean samples."""
    task, unwanted, kind, mode, n, splits = job
    _, images, classes = samples(task)
    undesired = (classes == unwanted).numpy()
    seen = embeddings(task, unwanted, images)[kind].astype(np.float64)
    shares, recalls = [], []
    for seed in range(splits):
        split = Split(undesired, 1_000 + seed)
        fitter = FASTFitter(seed=seed).update(undesired=seen[split.marked[:n]])
        used = np.zeros(len(seen), bool)
        used[split.marked[:n]] = True
        if mode == "looked at":
            clean = split.looked_at(n)
            used[clean] = True
            fitter.update(clean=seen[clean], unmarked=seen[split.test])
            concept = fitter.fit(rate=FALSE_ALARM, confidence=CONFIDENCE).concepts[0]
        else:
            pool = split.feedback[:3_000]
            used[pool] = True
            fitter.update(unmarked=seen[pool])
            concept = fitter.fit(rate=FALSE_ALARM, confidence=CONFIDENCE, max_prevalence=MAX_PREVALENCE).concepts[0]
        blocked = concept.score(seen) > concept.threshold.value
        shares.append(float(blocked[~undesired & ~used].mean()))
        recalls.append(float(blocked[undesired & ~used].mean()))
    return {
        "task": task,
        "class": unwanted,
        "latents": kind,
        "mode": mode,
        "n": n,
        "splits": splits,
        "kept": float(np.mean(np.array(shares) <= FALSE_ALARM)),
        "false_alarm_mean": float(np.mean(shares)),
        "false_alarm_worst": float(np.max(shares)),
        "recall_mean": float(np.mean(recalls)),
    }


def summary(rows: list[dict], separation: dict[str, dict]) -> dict:
    """Means over seeds, then over classes: of all, and of those that a classifier separates."""
    groups: dict[tuple, dict[str, list]] = {}
    for result in rows:
        good = separation[result["task"]][str(result["class"])] >= SEPARATED
        for row in result["rows"]:
            if "auc" not in row:
                continue
            for which in ("all", *(["separated"] if good else [])):
                key = (result["task"], row["latents"], row["method"], row["mode"], row["n"], which)
                per_class = groups.setdefault(key, {}).setdefault(result["class"], [])
                per_class.append((row["auc"], row["recall_at_5"]))
    return {
        "|".join(map(str, key)): {
            "auc": float(np.mean([np.mean([a for a, _ in found]) for found in classes.values()])),
            "recall_at_5": float(np.mean([np.mean([r for _, r in found]) for found in classes.values()])),
            "worst_auc": float(np.min([np.mean([a for a, _ in found]) for found in classes.values()])),
            "classes": len(classes),
        }
        for key, classes in groups.items()
    }


def operating(rows: list[dict]) -> dict:
    """Means of what the filters do at their thresholds."""
    groups: dict[str, list[dict]] = {}
    for result in rows:
        for row in result["rows"]:
            if "operating" in row:
                key = "|".join(map(str, (result["task"], row["latents"], row["method"], row["mode"], row["n"])))
                groups.setdefault(key, []).append(row["operating"])
    return {
        key: {name: float(np.mean([row[name] for row in found if name in row])) for name in found[0]}
        | {"runs": len(found), "false_alarm_worst": max(row["false_alarm"] for row in found)}
        for key, found in groups.items()
    }


def by_class(rows: list[dict], marks: int) -> dict:
    """AUC of ours and of the paper's mean difference, class by class."""
    found: dict[str, float] = {}
    for result in rows:
        for row in result["rows"]:
            if row.get("n") == marks and row["method"] in (OURS, "mean_difference") and "auc" in row:
                key = "|".join(map(str, (result["task"], row["latents"], row["method"], row["mode"], result["class"])))
                found.setdefault(key, []).append(row["auc"])
    return {key: float(np.mean(values)) for key, values in found.items()}


def pictures(unwanted: int = 3, looked_at: int = 200, drawn: int = 32) -> None:
    """What a GAN of digits draws, and what a filter releases of it: the README's example."""
    pipeline = GANPipeline.from_pretrained(small_gan.cached(small_gan.DIGITS))
    images = pipeline.draw(pipeline.prepare_latents(looked_at, torch.Generator().manual_seed(0)))
    marked = judge("digits", 1).classify(images) == unwanted
    fitter = FASTFitter(cached_digits_classifier()).update(undesired=images[marked], clean=images[~marked])
    fitter.update(unmarked=pipeline.draw(pipeline.prepare_latents(2_000, torch.Generator().manual_seed(2))))
    filtered = FilteredPipeline(pipeline, fitter.fit().checker())
    for name, action in (("original", "flag"), ("filtered", "blank")):
        generator = torch.Generator().manual_seed(1)
        found = filtered(num_images=drawn, generator=generator, output_type="pt", filter_action=action)
        grid(found.images * 2 - 1, columns=16).save(PICTURES / f"filter_digits_{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one class, few samples, nothing is written")
    parser.add_argument("--only", choices=("protocol", "text", "promise"), help="one part")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    arguments = parser.parse_args()
    quick, only = arguments.quick, arguments.only
    start()
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() and not quick else {}

    def keep(**parts) -> None:
        found.update(parts)
        if not quick:
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")

    if only in (None, "protocol"):
        size = (MARKS[:1], SEEDS[:1], 2_000, False) if quick else (MARKS, SEEDS, SAMPLES, True)
        jobs = [("digits", 3, *size)] if quick else [(task, c, *size) for task in TASKS for c in range(10)]
        separation = {
            task: {str(c): share for c, share in separated_classes(task).items()} for task in {j[0] for j in jobs}
        }
        rows = run(protocol_job, jobs, 1 if quick else arguments.workers)
        keep(
            separation=separation,
            summary=summary(rows, separation),
            operating=operating(rows),
            by_class=by_class(rows, MARKS[0]),
            marks=MARKS,
            seeds=SEEDS,
        )
    if only in (None, "text") and not quick:
        separation = separated_texts()
        good = [name for name, auc in separation.items() if auc >= SEPARATED]
        rows = run(text_job, [(name, MARKS, SEEDS, separation[name]) for name in good], arguments.workers)
        keep(
            text={
                "separation": separation,
                "texts": len(fortunes()[0]),
                "summary": summary(rows, {"fortunes": separation}),
                "by_class": by_class(rows, MARKS[0]),
                "sizes": {row["class"]: row["texts"] for row in rows},
            }
        )
    if only in (None, "promise") and not quick:
        jobs = [
            (task, unwanted, kind, mode, 20, SPLITS)
            for task, unwanted, kind in (
                ("digits", 3, "classifier"),
                ("digits", 8, "pca"),
                ("fashion_mnist", 6, "autoencoder"),
            )
            for mode in ("looked at", "pool")
        ]
        keep(promise=run(promise_job, jobs, arguments.workers))
    if not quick:
        draw(found)
        pictures()


def draw(found: dict) -> None:
    """AUC over the number of marks, digits."""
    for kind in OPERATED:
        series = {}
        for name, mode, label in (
            (OURS, "alone", "quadratic, undesired marks alone"),
            ("Gaussian SVM", "both", "Gaussian SVM, both"),
            ("linear_svc", "both", "linear SVC, both (paper)"),
            ("mean_difference", "both", "mean difference, both (paper)"),
            ("mean_difference", "alone", "mean difference, undesired alone (paper)"),
        ):
            values = [found["summary"][f"digits|{kind}|{name}|{mode}|{n}|all"]["auc"] for n in MARKS]
            series[label] = (list(MARKS), values)
        curves(series, PICTURES / f"filter_digits_{kind}.png", x_label="marks of a kind", y_label="AUC")


if __name__ == "__main__":
    main()
