"""Groups of examples: who is in them, and their μ, from the observations of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data import value_name
from ...tradeoff.bootstrap import moving_block_bootstrap
from ...tradeoff.estimate import MIN_OBSERVATIONS, Method, accumulated_mu, estimate_mu
from .observations import Observations


if TYPE_CHECKING:
    from datasets import Dataset


SIGNALS_AT_ONCE = 2**24  # group signals held at a time, 128 MiB

Groups = str | Mapping[str, Iterable[Any]] | Iterable[Any]


# Who is in them


def positions_of(ids: Iterable[Any], position: Mapping[Any, int], where: str) -> np.ndarray:
    """`[ids]` int: their positions in the training set; `where` is the errors' first word.

    Raises:
        ValueError: an unknown or repeated id.
    """
    if isinstance(ids, str):
        raise ValueError(f"{where}: {ids!r} is one text; pass a list of sample ids")
    ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    seen = set()
    for sample_id in ids:
        if sample_id not in position:
            example = next(iter(position))
            raise ValueError(f"{where}: no sample has id {sample_id!r}; this run's look like {example!r}")
        if sample_id in seen:
            raise ValueError(f"{where}: id {sample_id!r} occurs twice; name every sample once")
        seen.add(sample_id)
    return np.array([position[sample_id] for sample_id in ids], dtype=int)


def members_of(by: Groups, position: Mapping[Any, int], joined: Dataset) -> tuple[list[str], list[np.ndarray]]:
    """Names of groups and the positions of their examples.

    Args:
        by: name of a column in `joined`, names with sample ids, or the sample ids of one group.
        position (`Mapping`): in the training set, by sample id.
        joined (`Dataset`): of the training data, its first rows in the order of the training set.

    Raises:
        ValueError: an unknown or repeated id or name, an empty group, no such column or one that cannot name groups.
    """
    if isinstance(by, str):
        return _members_by_column(by, joined, len(position))
    groups = by if isinstance(by, Mapping) else {"group": by}
    if not groups:
        raise ValueError("by: no groups; pass a mapping from names to sample ids")
    names = [str(name) for name in groups]
    if len(set(names)) < len(names):
        raise ValueError(f"by: two groups are called {max(names, key=names.count)!r}; give each a name of its own")
    members = [positions_of(ids, position, f"group {name!r}") for name, ids in groups.items()]
    for name, positions in zip(groups, members, strict=True):
        if not len(positions):
            raise ValueError(f"group {name!r}: is empty; a group needs at least one sample id")
    return names, members


def _members_by_column(column: str, joined: Dataset, examples: int) -> tuple[list[str], list[np.ndarray]]:
    if column not in joined.column_names:
        has = f"has {', '.join(joined.column_names)}" if joined.column_names else "has none yet"
        raise ValueError(f"by={column!r}: is not a joined column (the report {has}); attach it with join()")
    places: dict[Any, list[int]] = {}
    try:
        for position, value in enumerate(joined.with_format(None)[column][:examples]):
            if value is not None:
                # No NaN equals another, so each would be a group of its own.
                places.setdefault(math.nan if value != value else value, []).append(position)
    except TypeError:
        raise ValueError(f"by={column!r}: holds {type(value).__name__} values; groups need plain ones") from None
    if not places:
        raise ValueError(f"by={column!r}: has no values")
    ordered = sorted(places, key=lambda value: (value != value, value))
    feature = joined.features[column]
    return [value_name(value, feature) for value in ordered], [np.array(places[value]) for value in ordered]


# Their μ


def group_mu(
    observations: Observations,
    members: Sequence[np.ndarray],
    columns: Sequence[int],
    method: Method,
    *,
    scale: float,
    **settings: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """μ of groups with moving-block bootstrap intervals over the steps, see [`InfluenceReport.group`].

    Args:
        members (`Sequence` of `[size]` int): for each group, positions in `sample_ids`.
        columns (`Sequence[int]`): positions in `observations.targets`.
        scale (`float`): multiplies σ.
        settings: `confidence`, `n_resamples`, `block_length` and `seed` of [`~hf_unlearn.tradeoff.estimate.estimate_mu`].

    Returns:
        `[groups, targets, 3]`: μ and its bounds, NaN where unknown, and `[groups]` int: steps that contain the group.

    Raises:
        ValueError: the observations are of every example on itself, or a setting outside its range.
    """
    # Composition takes every step for itself; only a sum over steps knows of their epochs.
    known = observations.independent_variance if method == "composed" else observations.variance
    mean, variance = observations.steps.mean[:, columns], scale**2 * known[:, columns]
    at_once = max(1, SIGNALS_AT_ONCE // (len(observations.steps.step) * len(observations.targets)))
    estimates, present = [], []
    for first in range(0, len(members), at_once):
        some = members[first : first + at_once]
        signals, seen = observations.group_signals(some)[..., columns], _steps_with(observations, some)
        if method == "accumulated":
            part = _accumulated(signals, variance, **settings)
            part[~seen.any(1)] = np.nan
        else:
            part = _estimated(mean, signals, seen, variance, method, **settings)
        estimates.append(part)
        present.append(seen.sum(1))
    return np.concatenate(estimates), np.concatenate(present)


def gains_with_and_without(
    observations: Observations, members: Sequence[np.ndarray], column: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each group, `[steps with it]` twice: what their batches gained, m_t(B), and would have without it, m_t(B∖S)."""
    mean, signals = observations.steps.mean[:, column], observations.group_signals(members)[..., column]
    return [
        (mean[steps], mean[steps] - signal[steps])
        for signal, steps in zip(signals, _steps_with(observations, members), strict=True)
    ]


def _steps_with(observations: Observations, members: Sequence[np.ndarray]) -> np.ndarray:
    """`[groups, steps]`: whether a group is in a step's batch."""
    seen = np.zeros((len(members), len(observations.steps.step)), dtype=bool)
    for index, positions in enumerate(members):
        inside = np.zeros(len(observations.sample_ids), dtype=bool)
        inside[positions] = True
        seen[index, observations.position[inside[observations.example] & (observations.weight > 0)]] = True
    return seen


def _accumulated(
    signals: np.ndarray, variance: np.ndarray, *, confidence: float, seed: int, **bootstrap: Any
) -> np.ndarray:
    """`[groups, targets, 3]`: μ and its bounds. All groups share each resample of the steps."""
    groups, steps, targets = signals.shape
    estimates = np.full((groups, targets, 3), np.nan)
    known = np.isfinite(variance).all(0)
    estimates[:, known, 0] = accumulated_mu(signals, np.sqrt(np.where(known, variance, 0)), axis=1)[:, known]
    if steps < MIN_OBSERVATIONS:
        return estimates
    wide = np.ascontiguousarray(signals.transpose(1, 0, 2)).reshape(steps, -1)

    def estimator(indices: np.ndarray) -> np.ndarray:
        resamples = np.arange(len(indices))[:, None] * steps
        times = np.bincount((indices + resamples).ravel(), minlength=len(indices) * steps)
        times = times.reshape(-1, steps).astype(float)
        # σ is held: that of the last steps makes up most of it, and μ would be a different one where they are not drawn.
        return (times @ wide).reshape(-1, groups, targets) / np.sqrt(np.where(known, variance, 1).sum(0))

    resampled = moving_block_bootstrap(estimator, np.arange(steps), generator=np.random.default_rng(seed), **bootstrap)
    # As in `estimate_mu`: order statistics, rounded outwards.
    for bound, share, rounding in ((1, (1 - confidence) / 2, "lower"), (2, (1 + confidence) / 2, "higher")):
        estimates[:, known, bound] = np.quantile(resampled, share, axis=0, method=rounding)[:, known]
    return estimates


def _estimated(
    mean: np.ndarray, signals: np.ndarray, seen: np.ndarray, variance: np.ndarray, method: Method, **settings: Any
) -> np.ndarray:
    """`[groups, targets, 3]`, by `estimate_mu` of the steps' gains."""
    groups, _, targets = signals.shape
    estimates = np.full((groups, targets, 3), np.nan)
    for index, target in np.ndindex(groups, targets):
        steps = np.ones_like(seen[index]) if method == "composed" else seen[index]
        own = {"sigma": np.sqrt(variance[:, target])} if method == "composed" else {}
        if not seen[index].any() or steps.sum() < MIN_OBSERVATIONS or not np.isfinite(own.get("sigma", 0.0)).all():
            continue
        gain = mean[steps, target]
        without = gain - signals[index, steps, target]
        found = estimate_mu(gain, without, statistic="gain", method=method, **own, **settings)
        estimates[index, target] = found.mu, found.low, found.high
    return estimates
