"""What a generator draws when nobody looks: moments of unmarked samples, streamed, and a few thousand of them kept."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...metrics.moments import Moments


Array = NDArray[np.float64]


class Reservoir:
    """A uniform sample of rows that come in batches: which ones are kept does not depend on the batches.

    Args:
        size (`int`): rows kept at most.
        dimension (`int`): of a row.
        seed (`int` or list of `int`): of the choice.
    """

    def __init__(self, size: int, dimension: int, seed: int | list[int]):
        self.size, self.seen = size, 0
        self.rows = np.zeros((0, dimension), np.float32)
        self._keys = np.zeros(0)
        self._random = np.random.default_rng(seed)

    def update(self, rows: Array) -> None:
        """Offer rows `[n, d]`."""
        self.seen += len(rows)
        keys = np.concatenate([self._keys, self._random.random(len(rows))])
        rows = np.concatenate([self.rows, rows.astype(np.float32)])
        if len(keys) > self.size:  # the smallest keys stay, in their order
            kept = np.sort(np.argpartition(keys, self.size)[: self.size])
            keys, rows = keys[kept], rows[kept]
        self._keys, self.rows = keys, rows

    def __len__(self) -> int:
        return len(self.rows)


class Background:
    """Unmarked samples: one part for fitting (moments and a reservoir), another, never fitted to, for calibration.

    Args:
        dimension (`int`): of an embedding.
        keep (`int`): rows kept at most, in each of the two parts.
        calibration_share (`float`): of the samples that go to the second part, each by its own toss.
        seed (`int`): of the tosses.
        covariance (`bool`): whether second moments are wanted: d² numbers.
    """

    def __init__(self, dimension: int, *, keep: int, calibration_share: float, seed: int, covariance: bool):
        self.moments = Moments(dimension) if covariance else None
        self.fitting = Reservoir(keep, dimension, [seed, 0])
        self.calibration = Reservoir(keep, dimension, [seed, 1])
        self._share, self._tosses = calibration_share, np.random.default_rng([seed, 2])

    def update(self, rows: Array) -> None:
        """Take in embeddings `[n, d]`."""
        aside = self._tosses.random(len(rows)) < self._share
        self.calibration.update(rows[aside])
        self.fitting.update(rows[~aside])
        if self.moments is not None:
            self.moments.update(rows[~aside])
