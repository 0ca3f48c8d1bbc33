r"""The noise of a run whose epochs show every example once.

If batches were independent draws, the variance of a run's gain Σ_t m_t would be Σ_t s²_t / b_t, s²_t the variance of a_{t,i} over
examples and b_t the size of the batch. But what one batch of an epoch has, the others lack. Over the random order of n examples the
variance of an epoch is (Hoeffding 1951, of a permutation's linear statistic)

$$ \frac1{m-1} \sum_i \Big( \sum_t \frac{u_{t,i}^2}{b_t} - \frac1n \big( \textstyle\sum_t u_{t,i} \big)^2 \Big), $$

u_{t,i} the example's gain less that of all, weighted by its predictions. What is left of an epoch is often a tenth of Σ s²_t / b_t or less:
what an example gains whenever it comes is no noise. So it has to be looked at itself: the same m examples, a panel, at some steps of
every epoch, each step standing for those around it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


PANEL = 256  # examples in it
LOOKS = (16, 8)  # at the panel in the last epoch, and the one before; most of what is left in the end comes from there
FEWER = 4  # in all others
SHARE_OF_START = 0.5  # of λᵀ Cov(θ₀) λ; see `variance_of_start`


@dataclass(frozen=True)
class Shuffling:
    """What is left of the variance of whole epochs.

    Attributes:
        steps_per_epoch (`int`): T.
        variance (`tuple[tuple[float, …], …]`): `[epochs][targets]`, from the first epoch on; NaN for one that was not looked at.
        steps (`tuple[int, …]`): `[epochs]`, how many steps of each epoch it is of.
    """

    steps_per_epoch: int
    variance: tuple[tuple[float, ...], ...]
    steps: tuple[int, ...]

    def variances(self, step: np.ndarray, independent: np.ndarray) -> np.ndarray:
        """σ² of steps whose sum over an epoch is the epoch's.

        Args:
            step (`[steps]` int): increasing, counted from 0, an epoch's first being a multiple of `steps_per_epoch`.
            independent (`[steps, targets]`): σ²_{t,c} of independent draws, which an epoch's variance is shared out by.
        """
        found, epoch = independent.astype(float), step // self.steps_per_epoch
        for rows in np.split(np.arange(len(step)), np.flatnonzero(np.diff(epoch)) + 1):
            number = int(epoch[rows[0]]) if len(rows) else len(self.variance)
            if number >= len(self.variance) or not np.isfinite(self.variance[number]).all():
                continue
            # Of the end of an epoch, as after a burn-in, its part.
            whole = np.array(self.variance[number]) * (len(rows) / self.steps[number])
            total = independent[rows].sum(0)
            with np.errstate(divide="ignore", invalid="ignore"):
                parts = np.where(total > 0, independent[rows] / total, 1 / len(rows))
            found[rows] = parts * whole
        return found


class Panel:
    """Measures [`Shuffling`] while a run's steps pass, last to first, by looking at the same examples at some of them.

    Args:
        examples (`int`): n, in an epoch.
        steps (`int`): of the run.
        steps_per_epoch (`int`): T.
        first (`int`, defaults to 0): step the sweep ends with.
    """

    def __init__(self, examples: int, steps: int, steps_per_epoch: int, first: int = 0):
        self.examples, self.length, self.first = examples, steps_per_epoch, first
        self.bins: dict[int, np.ndarray] = {}  # of each epoch, the bin of each of its steps
        self.looks: dict[int, tuple[int, int]] = {}  # step → its epoch and bin
        last = (steps - 1) // steps_per_epoch
        for epoch in range(last, first // steps_per_epoch - 1, -1):
            begin, end = max(first, epoch * steps_per_epoch), min(steps, (epoch + 1) * steps_per_epoch)
            count = min(end - begin, LOOKS[last - epoch] if last - epoch < len(LOOKS) else FEWER)
            self.bins[epoch] = _bins(end - begin, count, finer=epoch == last)
            for place in range(self.bins[epoch].max() + 1):
                inside = np.flatnonzero(self.bins[epoch] == place)
                self.looks[begin + int(inside[len(inside) // 2])] = (epoch, place)
        self._sizes: dict[int, list[tuple[int, int]]] = {}  # epoch → (step, size of its batch)
        self._gains: dict[tuple[int, int], Tensor] = {}
        self._found: dict[int, np.ndarray] = {}
        self._seen, self._order = torch.full((examples,), -1), {}
        self.is_shuffled, self._differs, self._compared = True, False, False

    def add(self, step: int, batch: Tensor) -> None:
        """A step's batch `[batch]`, whether or not it is looked at."""
        epoch, batch = step // self.length, batch.cpu()
        if (self._seen[batch] == epoch).any() or len(batch.unique()) < len(batch):
            self.is_shuffled = False  # drawn with replacement: no example makes up for another
        self._seen[batch] = epoch
        if not self._differs:
            later = self._order.get(step % self.length)
            self._compared |= later is not None
            self._differs = later is not None and not torch.equal(later, batch)
            self._order[step % self.length] = batch
        self._sizes.setdefault(epoch, []).append((step, len(batch)))
        if step == max(self.first, epoch * self.length):
            self._close(epoch)

    def look(self, step: int, weight: Tensor, gains: Tensor) -> None:
        """The panel at a step of `looks`, before the step is added: weights `[m]` and gains `[m, targets]`."""
        weight, gains = weight.double(), gains.double()
        share = weight / weight.sum()
        self._gains[self.looks[step]] = len(weight) * share[:, None] * (gains - share @ gains)

    def _close(self, epoch: int) -> None:
        sizes, bins = sorted(self._sizes.pop(epoch)), self.bins[epoch]
        places = range(bins.max() + 1)
        gains = [self._gains.pop((epoch, place), None) for place in places]
        if any(part is None for part in gains) or len(sizes) != len(bins) or len(gains[0]) < 2:
            return
        inverse = np.bincount(bins, [1 / size for _, size in sizes])
        count = np.bincount(bins)
        each = sum(part.square() * inverse[place] for place, part in enumerate(gains))
        if self.is_shuffled:
            each = each - sum(part * count[place] for place, part in enumerate(gains)).square() / self.examples
        self._found[epoch] = (each.sum(0) / (len(each) - 1)).clamp(min=0).cpu().numpy()

    @property
    def never_changes(self) -> bool:
        """Whether all epochs showed the examples in the same order."""
        return self._compared and not self._differs

    def result(self) -> Shuffling | None:
        """None where no epoch was looked at."""
        if not self._found:
            return None
        number, targets = max(self._found) + 1, len(next(iter(self._found.values())))
        unknown = np.full(targets, np.nan)
        return Shuffling(
            self.length,
            tuple(tuple(self._found.get(epoch, unknown).tolist()) for epoch in range(number)),
            tuple(len(self.bins.get(epoch, ())) for epoch in range(number)),
        )


def _bins(length: int, count: int, *, finer: bool) -> np.ndarray:
    """`[length]`: which look each step of an epoch belongs to. With `finer`, the more looks the nearer the end, where a step's share
    changes from each to the next.
    """
    if not finer or count >= length:
        return np.arange(length) * count // length
    edges = np.unique(np.round(np.geomspace(1, length, count)).astype(int))
    return np.searchsorted(edges, np.arange(1, length + 1))[::-1].max() - np.searchsorted(
        edges, np.arange(length, 0, -1)
    )


def variance_of_start(cotangents: Tensor, draws: Iterable[list[Tensor]]) -> np.ndarray:
    """What initialisations that are drawn anew add to σ²: half of λᵀ Cov(θ₀) λ, `[targets]`.

    By Poincaré's inequality the mean of λ₀ᵀ Cov(θ₀) λ₀ over runs is more than the variance of the loss, unless the loss is linear in
    θ₀; it is twice as much where the loss is quadratic in what was drawn. The λ of the first steps is far too large, above all
    under Adam, and that of the middle of the run takes its place.

    Args:
        cotangents (`Tensor`): λ, `[targets, parameters]`, of the state in the middle of the run.
        draws: initial parameters, each a list of tensors, at least twice. Elements of one tensor are taken for draws of one law.
    """
    drawn = [[part.detach().double().cpu() for part in parts] for parts in draws]
    found, start = np.zeros(len(cotangents)), 0
    for parts in zip(*drawn, strict=True):
        stacked = torch.stack(parts)
        size = stacked[0].numel()
        square = cotangents[:, start : start + size].double().square().sum(1).cpu().numpy()
        found += square * stacked.var(0).mean().item()
        start += size
    return SHARE_OF_START * found


def panel_of(examples: int, seed: int) -> Iterable[int]:
    """Positions of the examples in the panel, all of a small set."""
    generator = np.random.default_rng([seed, 2])
    return np.sort(generator.permutation(examples)[:PANEL]).tolist()
