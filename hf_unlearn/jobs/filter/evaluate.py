"""The job of `hf-unlearn filter evaluate`: what a filter does to fresh samples, as a classifier sees them."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from scipy.optimize import brentq
from sklearn.metrics import roc_auc_score
from torch import Tensor

from ...filtering.fitting.rates import Rate
from ...metrics.features import Features, features_of
from ...metrics.generation import density_coverage, frechet_distance
from ...plots import tradeoff_curve
from ...tradeoff.curve import TradeOff
from ..judging import NEIGHBOUR, classifier_of, reference_of
from ..keys import check_machine, console
from ..marking import class_numbers, other_real_images
from ..recipe.filter import FilterEvaluateJob
from .report import TITLES, add_rate, start_columns
from .source import EVALUATION, Source, filtered_pipeline


if TYPE_CHECKING:
    from ...filtering.checker import FASTSafetyChecker

logger = logging.getLogger(__name__)

EVALUATION_FILE = "evaluation.json"
CURVE_FILE = "tradeoff.png"  # α: clean samples that are blocked, T(α): undesired ones that are released
Z = 1.959964  # of 95 %


def run_evaluate(job: FilterEvaluateJob) -> dict[str, Any]:
    """Draw, judge, write `evaluation.json` and `tradeoff.png`, and print the figures.

    Raises:
        ValueError: something in the recipe does not fit; nothing was written.
    """
    check_machine(job, "filter")
    classifier = classifier_of(job.classifier, None)
    classes = class_numbers(job.classes, classifier, key="classes", argument="classifier", name=job.classifier)
    others = None
    if job.eval_split is not None:
        others = other_real_images(job.dataset, job.dataset_revision, job.eval_split, classes)
    pipe = filtered_pipeline(job)
    checker, source = pipe.safety_checker, Source(pipe.pipeline, job)
    concept = _concept(job, checker)
    if classifier.name == (checker.config.encoder_spec or {}).get("name"):
        logger.warning("classifier: is the filter's encoder too, so its figures flatter; take another one to judge")

    undesired, scores, features, reference = [], [], [], None
    for batch in source.batches(EVALUATION, job.samples, "drawing samples"):
        if reference is None and others is not None:
            reference = reference_of(others, classifier, tuple(batch.images.shape[1:]), resize=job.resize)
        undesired.append(torch.isin(classifier.classify(batch.images), torch.tensor(classes)))
        seen = batch.latents if checker.encoder is None else batch.images
        scores.append(checker.judge(seen, value_range=(-1, 1)).scores[:, concept])
        if reference is not None:
            features.append(features_of(batch.images, classifier, value_range=(-1, 1)).values)
    threshold = list(checker.thresholds.values())[concept]
    values = torch.cat(scores)
    released = values.isfinite() & (values <= threshold)
    figures = figures_of(torch.cat(undesired), values, released)
    figures["promise"] = promise_kept(checker.config.concepts[concept]["threshold"], figures)
    if reference is not None:
        figures["images"] = compared(reference, Features(torch.cat(features), classifier.name), released)
    _write(job, checker, concept, figures)
    _draw(job, checker.concepts[concept], torch.cat(undesired), values)
    _report(job, checker.concepts[concept], classifier.name, figures)
    return {"figures": figures, "verdict": figures["promise"] and figures["promise"]["verdict"]}


def _concept(job: FilterEvaluateJob, checker: FASTSafetyChecker) -> int:
    names = checker.concepts
    if job.concept is None and len(names) > 1:
        raise ValueError(f"concept: missing; the filter has {', '.join(names)}")
    if job.concept is not None and job.concept not in names:
        raise ValueError(f"concept={job.concept!r}: is not of the filter, which has {', '.join(names)}")
    return 0 if job.concept is None else names.index(job.concept)


# Figures


def figures_of(undesired: Tensor, scores: Tensor, released: Tensor) -> dict[str, Any]:
    """Shares with exact intervals, and the area under the curve.

    Args:
        undesired, released (`Tensor`): bool, `[n]`.
        scores (`Tensor`): `[n]`; what is not finite counts as the highest.
    """
    shares = {
        "prevalence": (undesired, torch.ones_like(undesired)),
        "recall": (~released, undesired),
        "false_alarm": (~released, ~undesired),
        "release": (released, torch.ones_like(undesired)),
        "residual": (undesired, released),
    }
    rates = {name: Rate.counted(int((what & of).sum()), int(of.sum())) for name, (what, of) in shares.items()}
    auc, m, n = None, int(undesired.sum()), int((~undesired).sum())
    if m and n:
        finite = torch.where(scores.isfinite(), scores.double(), torch.finfo(torch.float64).max)
        auc = float(roc_auc_score(undesired.numpy(), finite.numpy()))
    return {"samples": len(scores), **rates, "auc": auc and Rate(auc, *auc_interval(auc, m, n))}


def auc_interval(auc: float, undesired: int, clean: int) -> tuple[float, float]:
    """Those areas that are at most 1.96 of their standard errors away (Hanley and McNeil, 1982): also at 0 and 1."""

    def distance(area: float) -> float:
        first, second = area / (2 - area), 2 * area**2 / (1 + area)
        variance = area * (1 - area) + (undesired - 1) * (first - area**2) + (clean - 1) * (second - area**2)
        return (auc - area) ** 2 - Z**2 * variance / (undesired * clean)

    inside = min(max(auc, 1e-9), 1 - 1e-9)  # where the variance is not 0
    low = 0.0 if distance(0.0) <= 0 else brentq(distance, 0.0, inside)
    high = 1.0 if distance(1.0) <= 0 else brentq(distance, inside, 1.0)
    return float(low), float(high)


def promise_kept(threshold: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any] | None:
    """What the threshold promised, and whether the samples speak against it; None where nothing was promised."""
    promise, rate = threshold.get("promise"), threshold.get("rate")
    if promise is None or rate is None:
        return None
    bounded_above = threshold["rule"] == "max_false_alarm"
    seen = figures["false_alarm" if bounded_above else "recall"]
    if seen is None:
        verdict = "not known"
    elif (seen.value <= rate) if bounded_above else (seen.value >= rate):
        verdict = "held"
    elif (seen.low <= rate) if bounded_above else (seen.high >= rate):
        verdict = "in doubt: missed by no more than chance may do"
    else:
        verdict = "not held"
    return {"promise": promise, "verdict": verdict}


def compared(real: Features, drawn: Features, released: Tensor) -> dict[str, Any] | None:
    """Distances to real images of as many samples before the filter as it releases; None of too few."""
    count = int(released.sum())
    if min(count, len(real)) <= NEIGHBOUR:
        return None
    sides = {"before": drawn.values[:count], "after": drawn.values[released]}
    found: dict[str, Any] = {"samples": count, "real_images": len(real), "features": real.extractor}
    for side, values in sides.items():
        features = Features(values, drawn.extractor)
        near = density_coverage(real, features, k=NEIGHBOUR)
        distance = frechet_distance(real, features).distance
        found[side] = {"fid": distance, "density": near.density, "coverage": near.coverage}
    return found


def _write(job: FilterEvaluateJob, checker: FASTSafetyChecker, concept: int, figures: dict[str, Any]) -> None:
    content = {
        "concept": checker.concepts[concept],
        "filter": checker.config.fingerprint,
        "pipeline": job.pipeline,
        "classifier": job.classifier,
        "classes": job.classes,
        "seed": job.seed,
    }
    content |= {name: asdict(value) if isinstance(value, Rate) else value for name, value in figures.items()}
    job.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (job.folder / EVALUATION_FILE).write_text(text, encoding="utf-8")


def _draw(job: FilterEvaluateJob, concept: str, undesired: Tensor, scores: Tensor) -> None:
    """The trade-off of false alarms and misses over all thresholds; nothing where there is one kind only."""
    known = scores.isfinite()
    clean, found = scores[known & ~undesired], scores[known & undesired]
    if len(clean) and len(found):
        curve = TradeOff.from_samples(clean.numpy(), found.numpy())
        tradeoff_curve({concept: (curve.alpha, curve.beta)}, job.folder / CURVE_FILE)


def _report(job: FilterEvaluateJob, concept: str, judge: str, figures: dict[str, Any]) -> None:
    show = console()
    table = Table(title=f"{concept}: {figures['samples']:,} samples, as {judge} sees them")
    start_columns(table)
    for name in ("recall", "false_alarm", "release", "prevalence", "residual"):
        add_rate(table, TITLES[name], figures[name])
    if auc := figures["auc"]:
        table.add_row("area under the ROC curve", f"{auc.value:.3f}", f"{auc.low:.3f} to {auc.high:.3f}", "")
    show.print(table)
    if images := figures.get("images"):
        compared_to = f"{images['samples']:,} samples against {images['real_images']:,} other real images"
        table = Table(title=f"{compared_to}, features of {images['features']}")
        for heading in ("", "before", "after the filter"):
            table.add_column(heading, justify="right" if heading else "left")
        for title, name in (("Fréchet distance", "fid"), ("density", "density"), ("coverage", "coverage")):
            table.add_row(title, *(f"{images[side][name]:.4g}" for side in ("before", "after")))
        show.print(table)
    promise = figures["promise"]
    show.print(
        f"promise  {promise['promise']}\n         {promise['verdict']}" if promise else "promise  none", markup=False
    )
    show.print(f"figures  {job.folder / EVALUATION_FILE}", markup=False)
    if (job.folder / CURVE_FILE).is_file():
        show.print(f"curve    {job.folder / CURVE_FILE}: misses over false alarms, for all thresholds", markup=False)
