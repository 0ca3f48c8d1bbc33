"""Influence by brute force: retrain without a group many times over and compare the laws of the losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from .ensembles import (
    CHUNK_MODELS,
    Rows,
    _checked_rows,
)


Train = Callable[[list[Tensor], list[int]], Tensor]


@dataclass(frozen=True)
class BruteForceMu:
    r"""The influence of groups S on targets as Gaussian μ, from the losses of R runs with S (P) and R without (Q):

    $$ \mu = \frac{\bar\ell_Q - \bar\ell_P}{s}, \qquad s^2 = \frac{s_P^2 + s_Q^2}{2}, \qquad
       \operatorname{se}^2 = \frac2R + \mu^2\,\frac{s_P^4 + s_Q^4}{8\,(R-1)\,s^4} $$

    μ > 0: S *helps* the target (without S its loss is higher). s is the pooled standard deviation with R−1 degrees of
    freedom each (Hedges 1981, without the small-sample factor: |μ| is too large by about 3/(8(R−1)) of itself). The
    standard error is the delta method's for Gaussian losses; their variances may differ. All groups share the runs
    of P, so the errors of one target's μ are correlated, by one half at μ = 0.

    Reliability is the correlation to expect between these μ and those of a second, equal experiment: Spearman r between
    two random halves of the runs, averaged over splits, then 2r/(1+r) (Spearman–Brown), and 0 if r is negative. NaN
    below 4 runs or with one μ to rank.

    Attributes:
        mu (`Tensor`): `[groups, targets]`, fp64 as all that follows.
        standard_error (`Tensor`): `[groups, targets]`.
        sd (`Tensor`): s, `[groups, targets]`; μ·s is the change of the loss itself.
        with_losses (`Tensor`): `[R, targets]`.
        without_losses (`Tensor`): `[groups, R, targets]`.
        reliability (`float`): over all groups and targets.
        target_reliability (`Tensor`): over the groups, by target, `[targets]`.
    """

    mu: Tensor
    standard_error: Tensor
    sd: Tensor
    with_losses: Tensor
    without_losses: Tensor
    reliability: float
    target_reliability: Tensor

    @classmethod
    def from_losses(
        cls, with_losses: Tensor, without_losses: Tensor, *, splits: int = 50, seed: int = 0
    ) -> BruteForceMu:
        """From losses that were collected before, `[R, targets]` and `[groups, R, targets]`.

        Without `splits`, no reliability (NaN).

        Raises:
            ValueError: shapes that do not fit, fewer than 2 runs, or losses that are not finite or never vary.
        """
        shape = tuple(without_losses.shape)
        if len(shape) != 3 or tuple(with_losses.shape) != shape[1:] or 0 in shape:
            raise ValueError(
                f"with_losses {list(with_losses.shape)}, without_losses {list(shape)}: must be [R, C] and [groups, R, C]"
            )
        if shape[1] < 2:
            raise ValueError(f"n_runs={shape[1]}: must be at least 2, or the losses have no standard deviation")
        with_losses, without_losses = with_losses.detach().double(), without_losses.detach().double()
        broken = int((~with_losses.isfinite()).sum() + (~without_losses.isfinite()).sum())
        if broken:
            raise ValueError(f"{broken} of the losses are not finite: some runs diverged")
        mu, sd = _mu_and_sd(with_losses, without_losses)
        if not (sd > 0).all():
            raise ValueError("the losses of some target never vary between runs: do the runs heed their seeds?")
        runs = shape[1]
        fourth = (with_losses.var(0).square() + without_losses.var(1).square()) / (8 * (runs - 1) * sd**4)
        reliability, by_target = _split_half_reliability(with_losses, without_losses, splits, seed)
        standard_error = (2 / runs + mu.square() * fourth).sqrt()
        return cls(mu, standard_error, sd, with_losses, without_losses, reliability, by_target)


def brute_force_mu(
    train: Train,
    n_rows: int,
    groups: Sequence[Rows],
    n_runs: int,
    *,
    seed: int = 0,
    models_per_call: int = CHUNK_MODELS,
) -> BruteForceMu:
    """Train `n_runs` models on all rows and `n_runs` without each group, every run with a seed of its own.

    ```python
    def train(members, seeds):
        state = train_ensemble(make_model, inputs, labels, members, seeds, epochs=10, batch_size=50, lr=0.1)
        return ensemble_losses(make_model, state, test_inputs, test_labels, test_labels)

    truth = brute_force_mu(train, len(inputs), groups, n_runs=100)
    ```

    Args:
        train (callable): `train(members, seeds) -> losses [len(members), targets]`: `members[i]` holds the rows, in
            ascending order, that run i trains on with all its randomness from `seeds[i]`.
        n_rows (`int`): rows of the training set D.
        groups (sequence of row indices): each S to leave out. Groups may overlap.
        n_runs (`int`): R, runs per law; the standard error of a small μ is √(2/R).
        seed (`int`): decides the seeds of all the runs and the splits.
        models_per_call (`int`): runs handed to one call of `train`, which bounds its memory.

    Returns:
        [`BruteForceMu`]

    Raises:
        ValueError: fewer than 2 runs, no groups, a group that is empty, is everything, or names rows that are unknown
            or twice the same, or losses of the wrong shape.
    """
    if n_runs < 2:
        raise ValueError(f"n_runs={n_runs}: must be at least 2, or the losses have no standard deviation")
    if models_per_call < 1:
        raise ValueError(f"models_per_call={models_per_call}: must be at least 1")
    if not len(groups):
        raise ValueError("groups: none, so there is no influence to measure")
    kept = [torch.arange(n_rows)]
    for i, group in enumerate(groups):
        rows = _checked_rows(group, n_rows, f"groups[{i}]").cpu()
        stays = torch.ones(n_rows, dtype=torch.bool)
        stays[rows] = False
        if n_rows - len(rows) != int(stays.sum()):
            raise ValueError(f"groups[{i}]: names a row more than once")
        if not stays.any():
            raise ValueError(f"groups[{i}]: holds all {n_rows} rows, nothing is left to train on")
        kept.append(stays.nonzero().flatten())

    members = [rows for rows in kept for _ in range(n_runs)]
    seeds = np.random.default_rng(seed).choice(2**31, size=len(members), replace=False).tolist()
    losses = []
    for start in range(0, len(members), models_per_call):
        block = slice(start, start + models_per_call)
        values = torch.as_tensor(train(members[block], seeds[block]))
        if values.dim() != 2 or len(values) != len(members[block]):
            raise ValueError(f"train: returned {list(values.shape)}, must be [{len(members[block])}, targets]")
        losses.append(values)
    losses = torch.cat(losses).unflatten(0, (len(kept), n_runs))
    return BruteForceMu.from_losses(losses[0], losses[1:], seed=seed)


def disattenuated(correlation: float, reliability: float) -> float:
    """ρ/√reliability: the correlation with the true μ, of which the judge's μ is a noisy measurement (Spearman 1904).

    It corrects for the judge's noise alone, and may exceed 1 by chance.
    """
    if not 0 < reliability <= 1:
        raise ValueError(f"reliability={reliability}: must be above 0 and at most 1; more runs make it higher")
    return correlation / reliability**0.5


def _mu_and_sd(with_losses: Tensor, without_losses: Tensor) -> tuple[Tensor, Tensor]:
    sd = ((with_losses.var(0) + without_losses.var(1)) / 2).sqrt()
    return (without_losses.mean(1) - with_losses.mean(0)) / sd, sd


def _split_half_reliability(
    with_losses: Tensor, without_losses: Tensor, splits: int, seed: int
) -> tuple[float, Tensor]:
    groups, runs, targets = without_losses.shape
    half = runs // 2
    everything = torch.cat([with_losses[None], without_losses])
    generator = torch.Generator().manual_seed(seed)
    overall, by_target = [], []
    for _ in range(splits if half >= 2 else 0):
        order = torch.rand(groups + 1, runs, generator=generator).argsort(1).to(everything.device)
        shuffled = everything.gather(1, order[:, :, None].expand_as(everything))
        first, second = (
            _mu_and_sd(part[0], part[1:])[0] for part in (shuffled[:, :half], shuffled[:, half : 2 * half])
        )
        overall.append(_spearman(first.flatten(), second.flatten()))
        by_target.append(torch.stack([_spearman(a, b) for a, b in zip(first.T, second.T, strict=True)]))
    if not overall:
        return float("nan"), torch.full((targets,), float("nan"), dtype=everything.dtype, device=everything.device)
    r = torch.cat([torch.stack(overall).mean()[None], torch.stack(by_target).mean(0)]).clamp(min=0)
    reliability = 2 * r / (1 + r)
    return reliability[0].item(), reliability[1:]


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    if len(a) < 2:
        return a.new_tensor(float("nan"))  # what spearmanr says too, after a warning
    return a.new_tensor(spearmanr(a.cpu(), b.cpu()).statistic)
