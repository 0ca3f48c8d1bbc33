"""Mean and covariance of rows that nobody has to hold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]


class Moments:
    """Mean and covariance of rows that come in batches of any size, in fp64 (Chan, Golub and LeVeque, 1983).

    Args:
        dimension (`int`): of a row.
    """

    def __init__(self, dimension: int):
        self.count = 0
        self.mean = np.zeros(dimension)
        self._scatter = np.zeros((dimension, dimension))

    def update(self, rows: Array) -> None:
        """Take in rows `[n, d]`."""
        if not len(rows):
            return
        total, mean = self.count + len(rows), rows.mean(0)
        centred, shift = rows - mean, mean - self.mean
        self._scatter += centred.T @ centred + np.outer(shift, shift) * (self.count * len(rows) / total)
        self.mean = self.mean + shift * (len(rows) / total)
        self.count = total

    @property
    def covariance(self) -> Array:
        """Unbiased, `[d, d]`."""
        return self._scatter / max(1, self.count - 1)
