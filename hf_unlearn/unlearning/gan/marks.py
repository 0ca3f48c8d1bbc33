"""Feedback on a generator's samples, and what a few marks say about all the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.svm import SVC


FOLDS = 10
FEWEST = 5  # marks of either kind below which nothing is said about other samples


@dataclass(frozen=True)
class SpreadMarks:
    """What [`spread_marks`] says of samples that nobody has looked at.

    Args:
        negative (array of `bool`): `[n]`, shows what is undesired, with a margin.
        positive (array of `bool`): `[n]`, does not, with a margin; what is neither is in doubt.
        low, high (`float`): ≤ 0 and ≥ 0: scores below `low` are positive, those of `high` and above negative.
        missed (`float`): share of the negative marks that would pass for positive, each scored by a classifier that has not
            seen it: what was asked for, or less.
    """

    negative: np.ndarray
    positive: np.ndarray
    low: float
    high: float
    missed: float


def spread_marks(
    negatives: np.ndarray, positives: np.ndarray, others: np.ndarray, *, miss_rate: float = 0.05, seed: int = 0
) -> SpreadMarks:
    """Sort samples by what a few marked ones teach a support-vector classifier with a Gaussian kernel.

    How far from the boundary a sample must be is set by the marks themselves, each scored by a classifier that has not seen
    it: of the negative marks at most a share of `miss_rate` may count as positive, and among what counts as negative at most
    about that share may be positive.

    Args:
        negatives, positives, others (array): features `[m, d]`, `[k, d]`, `[n, d]`.
        miss_rate (`float`, defaults to 0.05): in (0, 1). With few marks more will pass than it says.
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
    centre = marked.mean(0)
    scale = (marked - centre).std() or 1.0
    marked = (marked - centre) / scale
    classifier = SVC(C=10.0, gamma=1 / marked.shape[1], class_weight="balanced")
    folds = StratifiedKFold(min(FOLDS, len(negatives), len(positives)), shuffle=True, random_state=seed)
    unseen = cross_val_predict(classifier, marked, undesired, cv=folds, method="decision_function")
    allowed = int(miss_rate * len(negatives))  # marks of either kind that may fall on the wrong side
    low = min(0.0, float(np.sort(unseen[undesired])[allowed]))
    wrong = np.sort(unseen[~undesired])[::-1]
    high = max(0.0, float(np.nextafter(wrong[allowed], np.inf))) if allowed < len(wrong) else 0.0
    scores = classifier.fit(marked, undesired).decision_function((others - centre) / scale)
    return SpreadMarks(scores >= high, scores < low, low, high, float((unseen[undesired] < low).mean()))
