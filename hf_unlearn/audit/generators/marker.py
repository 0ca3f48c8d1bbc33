"""Who sees what an image shows: the marker that the caller gives, and what images are compared by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...metrics.features import ClassifierFeatures, Features, features_of


PLACES = 8  # in a row and in a column: of images averaged down, where the marker has no features


class Marker:
    """Says of images whether they show the forgotten kind.

    Args:
        marker ([`ClassifierFeatures`] or callable): of images `[n, channels, height, width]` in [−1, 1] to `[n]`, class numbers or bools; or a pair of
            one that gives class numbers and of those that were to be forgotten, which stand above `classes`.
        classes (`tuple[int, …]`): the forgotten ones, for a marker that gives class numbers.

    Raises:
        ValueError: no marker, or it gives class numbers and `classes` is empty.
    """

    def __init__(self, marker: Any, classes: tuple[int, ...]):
        if isinstance(marker, tuple):
            marker, chosen = marker if len(marker) == 2 else (None, ())
            classes = tuple(map(int, chosen))
        if not callable(marker):
            raise ValueError(
                "marker: missing; an audit of a generator needs to know which images show what was to be forgotten: pass a ClassifierFeatures, or a "
                "function of images [n, channels, height, width] in [−1, 1]"
            )
        self.marker, self.classes = marker, classes
        self._see: Callable[[Tensor], Any] = marker.classify if isinstance(marker, ClassifierFeatures) else marker
        self.num_classes: int | None = None  # that it was seen to give; None for bools

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """`(kind, classes)`: which images show the forgotten kind, `[n]` bool, and their class numbers, if the marker gives such.

        Raises:
            ValueError: the marker's answer is something else.
        """
        with torch.no_grad():
            answer = self._see(images)
        seen = answer.detach().cpu() if isinstance(answer, Tensor) else torch.from_numpy(np.asarray(answer))
        if seen.shape != images.shape[:1] or seen.is_floating_point() or seen.is_complex():
            raise ValueError(
                f"marker: gives {seen.dtype} of shape {list(seen.shape)} for {len(images)} images, must be a class number or a bool for each"
            )
        if seen.dtype == torch.bool:
            return seen, None
        if not self.classes:
            raise ValueError(
                "marker: gives class numbers, and the forget rows have no label that says which are to be forgotten; add it, or let the marker answer "
                "with bools"
            )
        self.num_classes = max(self.num_classes or 0, 1 + max(self.classes), 1 + int(seen.max()))
        return torch.isin(seen.long(), torch.tensor(self.classes)), seen.long()

    def features(self, images: Tensor) -> Features:
        """What distances between sets of images are of: the classifier's features, or else the images averaged down to 8 × 8."""
        if isinstance(self.marker, ClassifierFeatures):
            return features_of(images, self.marker, value_range=(-1, 1))
        return Features(F.adaptive_avg_pool2d(images.float(), PLACES).flatten(1), f"pixels {PLACES} × {PLACES}")
