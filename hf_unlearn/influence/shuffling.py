r"""The noise of a run whose epochs show every example once.

If batches were independent draws, the variance of a run's gain Σ_t m_t would be Σ_t σ²_t with σ²_t = Var_i(a_{t,i}) / b. But what one
batch of an epoch has, the others lack. Over the random order of an epoch of T steps the variance is (Hoeffding 1951, of a permutation's
linear statistic)

$$ \sum_t \sigma^2_t - \frac1T \sum_{t,t'} \sigma_t\, \sigma_{t'}\, \rho(t, t'), $$

ρ the correlation over examples of a_{t,i} and a_{t',i}: what examples gain whenever they come is no noise. Nobody sees an example
twice in one epoch; but from the end of one to the beginning of the next examples come back after fewer than T steps, and
ρ is read off there, as a function of the steps between.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor


BINS = 4  # of the steps between two looks at an example, from 1 to an epoch
MIN_PAIRS = 30  # in each bin
FLOOR = 0.01  # least share of Σ σ²_t that is left; rounding of ρ must not make a variance negative


@dataclass(frozen=True)
class Shuffling:
    """How alike an example's gains at two steps are.

    Attributes:
        steps_per_epoch (`int`): T.
        correlation (`tuple[float]`): ρ at 1, …, T − 1 steps between, in equal bins, all targets together; it does not rise.
    """

    steps_per_epoch: int
    correlation: tuple[float, ...]

    def share(self, step: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """What is left of the variance of each step's epoch.

        Args:
            step (`[steps]` int): increasing, counted from 0, an epoch's first being a multiple of `steps_per_epoch`.
            variance (`[steps, targets]`): σ²_{t,c} of independent draws.

        Returns:
            `[steps, targets]` between 0 and 1, the same for all steps of an epoch.
        """
        left, length = np.ones_like(variance), self.steps_per_epoch
        for rows in np.split(np.arange(len(step)), np.flatnonzero(np.diff(step // length)) + 1):
            deviation, total = np.sqrt(variance[rows]), variance[rows].sum(0)
            together = np.einsum("tc,tu,uc->c", deviation, self._rho(step[rows]), deviation) / length
            with np.errstate(divide="ignore", invalid="ignore"):
                left[rows] = np.where(total > 0, 1 - together / total, 1).clip(FLOOR, 1)
        return left

    def _rho(self, step: np.ndarray) -> np.ndarray:
        between = np.abs(np.subtract.outer(step, step))
        places = between * len(self.correlation) // self.steps_per_epoch
        return np.where(between == 0, 1.0, np.asarray(self.correlation)[places])


class ShufflingMeter:
    """Measures [`Shuffling`] while steps pass, in either direction, in O(examples × targets) memory.

    Args:
        examples (`int`), targets (`int`): how many.
        steps_per_epoch (`int`): optimiser steps.
        device (`torch.device`): where the gains are.
    """

    def __init__(self, examples: int, targets: int, steps_per_epoch: int, device: torch.device | str = "cpu"):
        self.length = steps_per_epoch
        self._step = torch.full((examples,), -1, device=device)
        self._residual = torch.zeros(examples, targets, device=device)
        self._sum, self._count = (torch.zeros(BINS, device=device, dtype=torch.float64) for _ in range(2))
        self._shuffled = True

    def add(self, step: int, examples: Tensor, weight: Tensor, gains: Tensor) -> None:
        """One step: which examples `[batch]`, their weights `[batch]` and gains `[batch, targets]`."""
        if not self._shuffled or len(examples) < 2:
            return
        before = self._step[examples]
        repeated = ((before >= 0) & (before // self.length == step // self.length)).any()
        if repeated or len(examples.unique()) < len(examples):
            self._shuffled = False  # drawn with replacement: no example makes up for another
            return
        share = (weight / weight.sum())[:, None]
        residual = share * (gains - (share * gains).sum(0))
        residual = residual / residual.square().mean(0).sqrt().clamp_min(torch.finfo(gains.dtype).tiny)
        # Both deviations are from the mean of a batch that the example is in: their product is smaller by 1 − 1/b.
        residual = residual / (1 - 1 / len(examples)) ** 0.5
        between = (before - step).abs()
        seen = (before >= 0) & (between < self.length)
        products = (residual * self._residual[examples]).mean(1)[seen]
        places = between[seen] * BINS // self.length
        self._sum.index_add_(0, places, products.double())
        self._count.index_add_(0, places, torch.ones_like(products, dtype=torch.float64))
        self._step[examples], self._residual[examples] = step, residual.to(self._residual.dtype)

    def result(self) -> Shuffling | None:
        """None where it cannot be known: fewer than two epochs, an order that does not change, draws with replacement."""
        if not self._shuffled or self.length < BINS or (self._count < MIN_PAIRS).any():
            return None
        found = (self._sum / self._count).clamp(-1, 1).cpu().numpy()
        falling = isotonic_regression(found, weights=self._count.cpu().numpy(), increasing=False)
        return Shuffling(self.length, tuple(falling.x.tolist()))
