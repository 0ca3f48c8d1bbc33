"""Accuracy, split the way unlearning asks for it."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import ArrayLike, NDArray


def per_class_accuracy(predictions: ArrayLike, labels: ArrayLike, num_classes: int) -> NDArray[np.float64]:
    """Share of each class's examples that are given their own label.

    Args:
        predictions, labels (array of `int`): `[n]`.
        num_classes (`int`): length of the result.

    Returns:
        array: `[num_classes]` in [0, 1]; NaN for a class without examples.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    correct = np.bincount(labels[predictions == labels], minlength=num_classes)
    total = np.bincount(labels, minlength=num_classes)
    return np.divide(correct, total, out=np.full(num_classes, np.nan), where=total > 0)


def forget_retain_accuracy(
    predictions: ArrayLike, labels: ArrayLike, forgotten: Collection[int]
) -> tuple[float, float]:
    """Accuracy on the examples of the forgotten classes, and on all others; NaN where there are none.

    A model that has forgotten scores 0 on the first and, on the second, what it scored before.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    inside = np.isin(labels, list(forgotten))
    parts = (predictions[part] == labels[part] for part in (inside, ~inside))
    forget, retain = (float(part.mean()) if part.size else float("nan") for part in parts)
    return forget, retain


class Accuracy:
    """Share of right labels, of a whole evaluation or (`batch_eval_metrics`) summed over its batches."""

    def __init__(self):
        self.right = self.all = 0

    def __call__(self, evaluation, compute_result: bool = True) -> dict[str, float]:
        pairs = [(evaluation.predictions, evaluation.label_ids)]
        if isinstance(evaluation.label_ids, list):  # eval_do_concat_batches=False
            pairs = zip(*pairs[0], strict=True)
        for predictions, labels in pairs:
            logits = predictions[0] if isinstance(predictions, tuple) else predictions
            right = np.argmax(np.asarray(logits.cpu() if hasattr(logits, "cpu") else logits), -1)
            labels = np.asarray(labels.cpu() if hasattr(labels, "cpu") else labels)
            self.right, self.all = self.right + int((right == labels).sum()), self.all + labels.size
        if not compute_result:
            return {}
        share = self.right / max(self.all, 1)
        self.right = self.all = 0
        return {"accuracy": share}
