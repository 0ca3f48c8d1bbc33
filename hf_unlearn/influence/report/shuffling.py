r"""The noise of a run whose epochs show every example once.

If batches were independent draws, the variance of a run's gain Σ_t m_t would be Σ_t σ²_t with σ²_t = s²_t / b_t, s²_t the variance of
a_{t,i} over examples. But what one batch of an epoch has, the others lack. Over the random order of n examples the variance of an epoch is
(Hoeffding 1951, of a permutation's linear statistic)

$$ \sum_t \sigma^2_t - \frac1n \sum_{t,t'} s_t\, s_{t'}\, \rho(t, t'), $$

ρ the correlation over examples of a_{t,i} and a_{t',i}: what examples gain whenever they come is no noise. Nobody sees an example
twice in one epoch; but from the end of one to the beginning of the next examples come back after fewer steps than an epoch has,
and ρ is read off there, as a function of the steps between.

s_t and ρ are those of batches. Where batches are small, or a few examples' gains dwarf the others', both come out too small and σ too
large, though less than without.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor


BINS = 4  # of the steps between two looks at an example
MIN_PAIRS = 30  # of looks; a bin with fewer shares its neighbour's
ROUNDING = 1e-12  # of gains, relative: below it they do not differ
FLOOR = 0.01  # least share of Σ σ²_t that is left; rounding of ρ must not make a variance negative


@dataclass(frozen=True)
class Shuffling:
    """How alike an example's gains at two steps are.

    Attributes:
        steps_per_epoch (`int`): T, at least 2.
        correlation (`tuple[float]`): ρ at 1, …, T − 1 steps between, in equal bins, all targets together; it does not rise.
    """

    steps_per_epoch: int
    correlation: tuple[float, ...]

    def share(self, step: np.ndarray, variance: np.ndarray, size: np.ndarray, examples: int) -> np.ndarray:
        """What is left of the variance of each step's epoch.

        Args:
            step (`[steps]` int): increasing, counted from 0, an epoch's first being a multiple of `steps_per_epoch`.
            variance (`[steps, targets]`): σ²_{t,c} of independent draws.
            size (`[steps]` int): b_t.
            examples (`int`): n.

        Returns:
            `[steps, targets]` between 0 and 1, the same for all steps of an epoch.
        """
        left, length = np.ones_like(variance), self.steps_per_epoch
        lags = np.arange(1, length)
        rho = np.concatenate([[1.0], 2 * np.asarray(self.correlation)[_bin(lags, length, len(self.correlation))]])
        for rows in np.split(np.arange(len(step)), np.flatnonzero(np.diff(step // length)) + 1):
            deviation = np.zeros((2 * length, variance.shape[1]))
            deviation[step[rows] % length] = np.sqrt(variance[rows] * size[rows, None])  # s_t
            # Σ_t s_t s_{t+lag} for every lag
            products = np.fft.irfft(np.abs(np.fft.rfft(deviation, axis=0)) ** 2, n=2 * length, axis=0)[:length]
            total = variance[rows].sum(0)
            with np.errstate(divide="ignore", invalid="ignore"):
                left[rows] = np.where(total > 0, 1 - rho @ products / examples / total, 1).clip(FLOOR, 1)
        return left


class ShufflingMeter:
    """Measures [`Shuffling`] while steps pass, in either direction, in O(examples × targets) memory.

    Args:
        examples (`int`), targets (`int`): how many.
        steps_per_epoch (`int`): optimiser steps, at least 2.
        device (`torch.device`): where the gains are.
    """

    def __init__(self, examples: int, targets: int, steps_per_epoch: int, device: torch.device | str = "cpu"):
        self.length, self.bins = steps_per_epoch, min(BINS, steps_per_epoch - 1)
        self._step = torch.full((examples,), -1, device=device)
        self._residual = torch.full((examples, targets), torch.nan, device=device)
        # of products, how many there are, and of how many examples, in each bin
        self._sum, self._count, self._pairs = torch.zeros(3, self.bins, device=device, dtype=torch.float64)
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
        share = (weight.double() / weight.double().sum())[:, None]
        part = share * gains
        residual = part - share * part.sum(0)
        # Both factors of a product are from the mean of a batch that the example is in, which makes it smaller by 1 − 1/b.
        scale = (residual.square().mean(0) * (1 - 1 / len(examples))).sqrt()
        moved = scale > ROUNDING * part.abs().mean(0)  # targets that nothing moved become NaN, and are not counted
        residual = residual / scale.where(moved, torch.nan)
        between = (before - step).abs()
        seen = (before >= 0) & (between < self.length)
        products = (residual * self._residual[examples])[seen]
        known = products.isfinite()
        places = _bin(between[seen], self.length, self.bins)
        self._sum.index_add_(0, places, products.nan_to_num(0, 0, 0).sum(1))
        self._count.index_add_(0, places, known.sum(1).double())
        self._pairs.index_add_(0, places, known.any(1).double())
        self._step[examples], self._residual[examples] = step, residual.to(self._residual.dtype)

    def result(self) -> Shuffling | None:
        """None where it cannot be known: one epoch, an order that does not change, draws with replacement, too few examples."""
        total, count, pairs = (part.cpu().numpy() for part in (self._sum, self._count, self._pairs))
        if not self._shuffled or pairs.sum() < MIN_PAIRS:
            return None
        merged = together(pairs)
        weights = np.array([count[places].sum() for places in merged])
        found = np.array([total[places].sum() for places in merged]) / weights
        falling = isotonic_regression(found.clip(-1, 1), weights=weights, increasing=False).x
        return Shuffling(self.length, tuple(np.repeat(falling, [len(places) for places in merged]).tolist()))


def together(pairs: np.ndarray) -> list[list[int]]:
    """Neighbouring bins in groups that each have `MIN_PAIRS` or more, as small as can be; one group where all have fewer."""
    groups: list[list[int]] = [[]]
    for place in range(len(pairs)):
        groups[-1].append(place)
        if min(pairs[groups[-1]].sum(), pairs[place + 1 :].sum()) >= MIN_PAIRS:
            groups.append([])
    return groups


def _bin(lags, length: int, bins: int):
    """Which of equal bins each of 1 … length − 1 steps between is in."""
    return (lags - 1) * bins // (length - 1)
