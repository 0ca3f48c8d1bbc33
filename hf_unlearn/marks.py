"""Feedback on a generator's samples, and what a few marks say about all the others."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.svm import SVC


logger = logging.getLogger(__name__)

FOLDS = 10
FEWEST = 5  # marks of either kind below which nothing is said about other samples


@dataclass(frozen=True)
class SpreadMarks:
    """What [`spread_marks`] says of samples that nobody has looked at.

    Args:
        negative (array of `bool`): `[n]`, probably shows what is undesired: above the boundary between the marks.
        positive (array of `bool`): `[n]`, probably does not, with a margin; what is neither is in doubt.
        margin (`float`): ≤ 0, how far below the boundary a positive is, in units of the classifier.
        missed (`float`): share of the negative marks that would pass for positive, by cross-validation; what was asked for,
            or less where the boundary itself misses fewer.
    """

    negative: np.ndarray
    positive: np.ndarray
    margin: float
    missed: float


def spread_marks(
    negatives: np.ndarray, positives: np.ndarray, others: np.ndarray, *, miss_rate: float = 0.05, seed: int = 0
) -> SpreadMarks:
    """Sort samples by what a few marked ones teach a support-vector classifier with a Gaussian kernel.

    How far from the boundary a sample must be to count as positive is set by the marks themselves: so far that of the
    negative marks, each scored by a classifier that has not seen it, only `miss_rate` would pass.

    Args:
        negatives, positives, others (array): features `[m, d]`, `[k, d]`, `[n, d]`.
        miss_rate (`float`, defaults to 0.05): in (0, 1).
        seed (`int`): of the folds.

    Raises:
        ValueError: fewer than five marks of a kind, or a rate that is none.
    """
    if min(len(negatives), len(positives)) < FEWEST:
        raise ValueError(
            f"negatives, positives: {len(negatives)} and {len(positives)} marks are too few to sort other samples by; "
            f"mark {FEWEST} of each at least"
        )
    if not 0 < miss_rate < 1:
        raise ValueError(f"miss_rate={miss_rate}: must be in (0, 1)")
    marked = np.concatenate([negatives, positives]).astype(np.float64)
    undesired = np.arange(len(marked)) < len(negatives)
    centre, scale = marked.mean(0), marked.std() or 1.0
    marked = (marked - centre) / scale
    classifier = SVC(C=10.0, gamma=1 / marked.shape[1], class_weight="balanced")
    folds = StratifiedKFold(min(FOLDS, len(negatives), len(positives)), shuffle=True, random_state=seed)
    unseen = cross_val_predict(classifier, marked, undesired, cv=folds, method="decision_function")[undesired]
    margin = min(0.0, float(np.quantile(unseen, miss_rate)))
    scores = classifier.fit(marked, undesired).decision_function((others - centre) / scale)
    return SpreadMarks(scores >= 0, scores < margin, margin, float((unseen < margin).mean()))
