"""What one training run saw of its examples, and the μ of examples and groups that follows from it.

At step t and target c, example i of batch B contributes the gain a_{t,i,c}, a decrease of the target's loss if it were alone in
the batch. With weights w (predictions in the example) the batch as a whole gains the weighted mean m_{t,c}(B), and without the
group S it would have gained m_{t,c}(B∖S). Their difference is the signal of S,

    δ_{t,c}(S) = m_{t,c}(B) − m_{t,c}(B∖S) = w_S / (w_B − w_S) · (m_{t,c}(S) − m_{t,c}(B)),

and the noise is σ²_{t,c} = Var_i(a_{t,i,c}) / b, the variance of m_{t,c} over the draw of the batch (less, where it is known, what the
batches of an epoch have in common, see `shuffling`). Then

    μ_c(S) = Σ_t δ_{t,c}(S) / sqrt(Σ_t σ²_{t,c}).

μ > 0: S helps the target (without S its loss is higher), see [`hf_unlearn.tradeoff.estimate`].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy import stats

from .shuffling import Shuffling


@dataclass(frozen=True, eq=False)
class Steps:
    """What is known of whole steps, `[steps]` each, by increasing `step`.

    Attributes:
        step (`[steps]` int): optimiser steps, counted from 0.
        weight (`[steps]`): w_B, the predictions in the batch.
        size (`[steps]` int): examples in the batch.
        mean (`[steps, targets]`): m_{t,c}(B).
        variance (`[steps, targets]`): σ²_{t,c}; NaN where a batch of one example does not tell.
    """

    step: np.ndarray
    weight: np.ndarray
    size: np.ndarray
    mean: np.ndarray
    variance: np.ndarray


@dataclass(frozen=True, eq=False)
class Observations:
    """Rows of one run: example `example[r]` was in the batch of step `step[r]`.

    Attributes:
        sample_ids (`[examples]`): identifiers, as the dataset gives them.
        targets (`tuple[str]`): names of the targets; `("self",)` if every example is its own.
        step (`[rows]` int): steps that are in `steps.step`.
        example (`[rows]` int): positions in `sample_ids`.
        weight (`[rows]`): predictions in the example (1 for a classifier).
        value (`[rows, targets]`): a_{t,i,c}, a gain. For `"self"`: `[rows, 3]`, the gain of the example on itself, the batch's mean
            gain on it, and the variance of that mean.
        steps (`Steps`): of the whole batches.
        margin (`[rows]`, *optional*): how much more probable the example's label was than the best other one, in [−1, 1], when the
            step was taken; NaN where unknown, as of language models.
        shuffling (`Shuffling`, *optional*): what the batches of an epoch have in common, which is no noise; None takes them for
            independent draws, and σ is too large.
        start (`[targets]`, *optional*): what initialisations that are drawn anew add to σ²; None where the model's is always the same.
    """

    sample_ids: np.ndarray
    targets: tuple[str, ...]
    step: np.ndarray
    example: np.ndarray
    weight: np.ndarray
    value: np.ndarray
    steps: Steps
    margin: np.ndarray | None = None
    shuffling: Shuffling | None = None
    start: np.ndarray | None = None

    def __post_init__(self):
        if self.margin is None:
            object.__setattr__(self, "margin", np.full(len(self.step), np.nan))

    @property
    def is_self(self) -> bool:
        return self.targets == ("self",)

    @cached_property
    def position(self) -> np.ndarray:
        """`[rows]`: the row of `steps` that each observation belongs to."""
        return np.searchsorted(self.steps.step, self.step)

    @cached_property
    def independent_variance(self) -> np.ndarray:
        """`[steps, targets]`: σ²_{t,c} of a batch that is drawn for itself. A batch of one example does not tell it: the variance of an
        example at the other steps does, or, where all batches are of one, half the mean squared difference of neighbouring steps.
        """
        given, size = self.steps.variance, self.steps.size[:, None]
        known = np.isfinite(given)
        if known.all() or not len(given):
            return given
        with np.errstate(invalid="ignore"):
            each = np.where(known, size * given, 0).sum(0) / known.sum(0)
            between = 0.5 * np.square(np.diff(self.steps.mean, axis=0)).sum(0) / max(1, len(given) - 1)
        return np.where(known, given, np.where(known.any(0), each / size, between))

    @cached_property
    def variance(self) -> np.ndarray:
        """`[steps, targets]`: the same, less what the batches of an epoch have in common, and with what initialisations add. Right as a
        sum over steps only.
        """
        found = self.independent_variance
        if self.shuffling is not None and len(found):
            found = self.shuffling.variances(self.steps.step, found)
        # The start has no step of its own: all steps share it.
        return found if self.start is None or not len(found) else found + self.start / len(found)

    @property
    def sigma(self) -> np.ndarray:
        """`[targets]`: standard deviation of the target's loss after the run, over the draw of its batches."""
        return np.sqrt(self.variance.sum(0))

    def signals(self) -> np.ndarray:
        """`[rows, targets]`: δ_{t,c}({i}) of each observation's own example."""
        mean = self.value[:, 1:2] if self.is_self else self.steps.mean[self.position]
        value = self.value[:, :1] if self.is_self else self.value
        others = self.steps.weight[self.position] - self.weight
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.where(others > 0, self.weight / others, np.nan)[:, None]
            signal = shares * (value - mean)
        if (
            not self.is_self and (alone := others <= 0).any()
        ):  # an empty batch gains nothing: what is lost is the gain itself
            signal[alone] = (value - self._trend[self.position])[alone]
        return np.nan_to_num(signal)

    @cached_property
    def _trend(self) -> np.ndarray:
        """`[steps, targets]`: mean of m over the five steps before and after, what a batch of other examples would have gained."""
        ones = np.ones(11)
        ones[5] = 0
        count = np.convolve(np.ones(len(self.steps.mean)), ones)[5:-5, None]
        around = np.stack([np.convolve(column, ones)[5:-5] for column in self.steps.mean.T], axis=1)
        return np.where(count > 0, around / np.maximum(count, 1), 0)

    def group_signals(self, members: Sequence[np.ndarray]) -> np.ndarray:
        """δ_{t,c}(S) of groups.

        Args:
            members (`Sequence` of `[size]` int): for each group, positions in `sample_ids`.

        Returns:
            `[groups, steps, targets]`: zero at the steps without the group.

        Raises:
            ValueError: the observations are of every example on itself.
        """
        if self.is_self:
            raise ValueError(
                "group: with target='self' every example is its own target, and a group has none; pass a target_dataset"
            )
        count, targets = len(self.steps.step), len(self.targets)
        signals = np.zeros((len(members), count, targets))
        for index, positions in enumerate(members):
            inside = np.zeros(len(self.sample_ids), dtype=bool)
            inside[positions] = True
            rows = inside[self.example]
            place, weight, value = self.position[rows], self.weight[rows].astype(float), self.value[rows].astype(float)
            own = np.bincount(place, weight, count)
            gain = np.stack([np.bincount(place, weight * value[:, c], count) for c in range(targets)], axis=1)
            others = (self.steps.weight - own)[:, None]
            touched, alone = own > 0, (own > 0) & (others[:, 0] <= 1e-6 * self.steps.weight)
            with np.errstate(divide="ignore", invalid="ignore"):
                rest = (self.steps.weight[:, None] * self.steps.mean - gain) / others
            signals[index, touched] = (self.steps.mean - rest)[touched]
            signals[index, alone] = (self.steps.mean - self._trend)[alone]
        return signals

    def example_mu(self, *, confidence: float = 0.95) -> ExampleMu:
        """μ of every example, the group {i}.

        Args:
            confidence (`float`, defaults to 0.95): of the intervals. They are Student's over an example's own observations, of
                which there are as many as epochs: wide, and no statement about σ.
        """
        signals, examples = self.signals(), len(self.sample_ids)
        count = np.bincount(self.example[self.weight > 0], minlength=examples)

        def total(values):
            return np.stack([np.bincount(self.example, column, examples) for column in values.T], axis=1)

        if self.is_self:
            # One σ for all: an example the model has to learn by heart has the noisiest loss, and its own σ would hide it.
            # It is over all steps, as with other targets, though an example's own σ² is known at the steps with it only.
            known = self.value[self.weight > 0, 2]
            noise = np.full((examples, 1), np.sqrt(known.mean() * len(self.steps.step)) if len(known) else np.nan)
        else:
            noise = np.broadcast_to(self.sigma, (examples, len(self.targets)))
        with np.errstate(divide="ignore", invalid="ignore"):
            number = count[:, None]
            mu = total(signals) / noise
            spread = np.sqrt(np.maximum(total(signals**2) - total(signals) ** 2 / number, 0) / (number - 1))
            error = (
                stats.t.ppf(0.5 + confidence / 2, np.maximum(count - 1, 1))[:, None] * spread * np.sqrt(number) / noise
            )
        mu = np.where(number > 0, mu, np.nan)
        error = np.where(number > 1, error, np.nan)
        return ExampleMu(mu=mu, low=mu - error, high=mu + error, n_observations=count)

    def mean_margin(self) -> np.ndarray:
        """`[examples]`: mean of the known margins over the run; NaN where there is none."""
        return self._mean(self.margin, np.isfinite(self.margin))

    def mean_weight(self) -> np.ndarray:
        """`[examples]`: predictions in an example, on average where it was seen; NaN where it never was."""
        return self._mean(self.weight, self.weight > 0)

    def _mean(self, values: np.ndarray, known: np.ndarray) -> np.ndarray:
        examples = len(self.sample_ids)
        count = np.bincount(self.example[known], minlength=examples)
        with np.errstate(invalid="ignore"):
            return np.bincount(self.example[known], values[known], examples) / count

    def since(self, step: int) -> Observations:
        """The observations from optimiser step `step` on."""
        rows, steps = self.step >= step, self.steps.step >= step
        kept = Steps(*(getattr(self.steps, name)[steps] for name in ("step", "weight", "size", "mean", "variance")))
        return replace(
            self,
            step=self.step[rows],
            example=self.example[rows],
            weight=self.weight[rows],
            value=self.value[rows],
            margin=self.margin[rows],
            steps=kept,
        )


@dataclass(frozen=True, eq=False)
class ExampleMu:
    """μ of single examples, `[examples, targets]` each; NaN where there is no observation (of a bound: fewer than two)."""

    mu: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n_observations: np.ndarray


def step_statistics(weight: np.ndarray, value: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """w_B, m_{t,c}(B) and σ²_{t,c} of one batch.

    Args:
        weight (`[batch]`): predictions in each example.
        value (`[batch, targets]`): a_{t,i,c}.

    Returns:
        w_B, `[targets]` and `[targets]`; the variance is NaN for a batch of one example.
    """
    total, size = weight.sum(), len(weight)
    share = (weight / total)[:, None]
    mean = (share * value).sum(0)
    if size < 2:
        return total, mean, np.full_like(mean, np.nan)
    return total, mean, size / (size - 1) * (share**2 * (value - mean) ** 2).sum(0)
