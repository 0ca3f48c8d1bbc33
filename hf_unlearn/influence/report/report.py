"""What a run tells of its training examples: μ of each, of groups, and which of them stand out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa
from scipy.special import stdtr

from ...tradeoff.discoveries import benjamini_hochberg, z_scores
from ...tradeoff.estimate import Method
from .groups import Groups, group_mu, members_of, positions_of
from .kept import Kept
from .observations import Observations
from .shown import Shown
from .unit import gain_of, unit_of, why_order_only, widened


if TYPE_CHECKING:
    from datasets import Dataset


COLUMNS = ("sample_id", "target", "mu", "mu_low", "mu_high", "z", "n_observations")

Side = Literal["helpful", "harmful", "both"]


@dataclass(frozen=True, eq=False, repr=False)
class InfluenceReport(Kept, Shown):
    r"""μ of every training example on every target, and what can be asked of it.

    $$ \mu_c(S) = \sum_t \delta_{t,c}(S) \,/\, \big(\texttt{scale} \cdot \sqrt{\textstyle\sum_t \sigma^2_{t,c}}\big) $$

    in standard deviations of the target's loss over trainings with `propagated`, and with `in_run` after calibration runs; else it has
    **no unit**, and orders examples alone (`unit` says which). See [`Observations`]. **μ > 0: the example helps the target** (it
    taught it; without it the loss is higher). μ < 0: it harms it.

    Where μ has a unit, intervals cover the μ of retraining: the noise of the estimate, and what first order and σ were found to be
    wrong by on twelve tasks. Without one they cover the noise alone. An example is seen once an epoch, so its interval is wide;
    its z is its distance from the bulk of all examples (median, and the interquartile range as scale). It has no p-value: the bulk
    has heavy tails, and of examples that did nothing one in ten would be below 0.05. An empirical μ depends on the data and
    **is no privacy guarantee**.

    Args:
        dataset (`Dataset`): one row per target and example, by target, then in the order of `observations.sample_ids`:
            `sample_id`, `target`, `mu`, `mu_low`, `mu_high`, `z`, `n_observations`, and columns that
            [`~InfluenceReport.join`] attached. μ is NaN for an example that was never seen, the bounds below two
            observations.
        observations (`Observations`): of the whole run.
        manifest (`dict`): what the run said of itself, `run_id` among it.
        scale (`float`, defaults to 1.0): multiplies σ; from calibration runs.
        burn_in (`int`, defaults to 0): observations of optimiser steps before this one are left out.
        confidence (`float`, defaults to 0.95): of the intervals in `dataset`.
        token_rows (`Dataset`, *optional*): of [`attribute_tokens`].
    """

    dataset: Dataset
    observations: Observations
    manifest: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    burn_in: int = 0
    confidence: float = 0.95
    token_rows: Dataset | None = None

    @classmethod
    def from_observations(
        cls,
        observations: Observations,
        manifest: Mapping[str, Any],
        *,
        burn_in: int = 0,
        scale: float = 1.0,
        confidence: float = 0.95,
    ) -> InfluenceReport:
        """The report of a run, see the class.

        `observations` of a run and the `manifest` it wrote; the first `burn_in` steps are not counted, σ is multiplied by `scale`, and
        intervals hold with `confidence`, in (0, 1).

        Raises:
            ValueError: no step is left after `burn_in`, or an argument outside its range.
        """
        from datasets import Dataset

        _check_confidence(confidence)
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"scale={scale!r}: must be positive and finite; it multiplies σ")
        if not len(observations.steps.step):
            raise ValueError(
                "observations: hold no step; train again, to the end (observation='propagated' records when training has ended)"
            )
        used = observations.since(burn_in) if burn_in else observations
        if burn_in < 0 or not len(used.steps.step):
            last = max(observations.steps.step)
            raise ValueError(f"burn_in={burn_in!r}: leaves no steps (the last one observed is {last})")
        estimates = used.example_mu(confidence=confidence)
        number, targets = estimates.mu.shape
        scale_of_mu = gain_of(manifest) / scale
        mu, low, high = (scale_of_mu * column.T for column in (estimates.mu, estimates.low, estimates.high))
        low, high = widened(mu, low, high, manifest, confidence)
        z = np.stack([_z_scores(values) for values in mu])
        dataset = Dataset.from_dict(
            {
                "sample_id": observations.sample_ids.tolist() * targets,
                "target": [name for name in observations.targets for _ in range(number)],
                "mu": mu.ravel(),
                "mu_low": low.ravel(),
                "mu_high": high.ravel(),
                "z": z.ravel(),
                "n_observations": np.tile(estimates.n_observations, targets),
            }
        )
        report = cls(dataset, observations, dict(manifest), float(scale), int(burn_in), float(confidence))
        report.__dict__["_used"] = used
        return report

    # What is in it

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets."""
        return self.observations.targets

    @property
    def unit(self) -> str:
        """What μ is measured in; it begins with "no unit" where a report orders examples and says nothing more."""
        return unit_of(self.manifest)

    @property
    def order_only(self) -> bool:
        """Whether μ has no unit: within a target it orders examples, and groups of like size, and means nothing beyond that."""
        return why_order_only(self.manifest) is not None

    @property
    def sigma(self) -> dict[str, float]:
        """By target, `scale` · √(Σ_t σ²_{t,c}): the standard deviation that μ is in. NaN for `"self"`, and where there is none."""
        if self.order_only:
            return dict.fromkeys(self.targets, math.nan)
        return dict(zip(self.targets, (self.scale * self._used.sigma).tolist(), strict=True))

    @cached_property
    def _used(self) -> Observations:
        return self.observations.since(self.burn_in) if self.burn_in else self.observations

    @cached_property
    def _position(self) -> dict[Any, int]:
        return {sample_id: position for position, sample_id in enumerate(self.observations.sample_ids.tolist())}

    @property
    def _joined(self) -> list[str]:
        """Names of the columns that `join` attached."""
        return [name for name in self.dataset.column_names if name not in COLUMNS]

    def _values(self, column: str, target: str) -> np.ndarray:
        """`[examples]` of one target."""
        number = len(self.observations.sample_ids)
        first = self.targets.index(target) * number
        return np.asarray(self.dataset.with_format("numpy")[column][first : first + number])

    def _rows(self, positions: Sequence[int] | np.ndarray, target: str) -> Dataset:
        first = self.targets.index(target) * len(self.observations.sample_ids)
        return self.dataset.select((np.asarray(positions, dtype=int) + first).tolist())

    def _one_target(self, target: str | None) -> str:
        if target is None and len(self.targets) == 1:
            return self.targets[0]
        if target not in self.targets:
            raise ValueError(f"target={target!r}: must be one of {', '.join(map(repr, self.targets))}")
        return target

    def _some_targets(self, target: str | Sequence[str] | None) -> list[str]:
        if target is None:
            return list(self.targets)
        if isinstance(target, str):
            return [self._one_target(target)]
        return [self._one_target(name) for name in target]

    # Single examples

    def top(self, k: int, target: str | None = None, harmful: bool = False, *, per_token: bool = False) -> Dataset:
        """The k examples with the largest μ, most helpful first: those that taught the target most.

        Args:
            k (`int`): at least 1; all examples if there are fewer.
            target (`str`, *optional*): may be left out where there is one.
            harmful (`bool`, defaults to `False`): the smallest μ instead, most harmful first.
            per_token (`bool`, defaults to `False`): order by μ over the tokens that are predicted of an example. Training is a mean over tokens,
                so a long text does more than a short one of its kind; who looks for the kind finds more of it so (docs/methods/f_ine.md).

        Returns:
            `Dataset`: columns of `dataset`; examples without μ come last.

        Raises:
            ValueError: k below 1, no such target, or several to choose from.
        """
        if k < 1:
            raise ValueError(f"k={k!r}: must be at least 1")
        target = self._one_target(target)
        mu = self._values("mu", target)
        if per_token:
            mu = mu / self._used.mean_weight()
        return self._rows(np.argsort(mu if harmful else -mu, kind="stable")[:k], target)  # NaN sorts last

    def select(
        self,
        ids: Iterable[Any] | None = None,
        target: str | Sequence[str] | None = None,
        min_mu: float | None = None,
        min_z: float | None = None,
    ) -> Dataset:
        """The rows that fulfil every condition, in the order of `ids` or of the training set.

        Args:
            ids (*optional*): sample ids.
            target (`str` or list of `str`, *optional*): all of them if left out.
            min_mu, min_z (`float`, *optional*): least value; an example without one does not fulfil it.

        Raises:
            ValueError: unknown or repeated ids, or no such target.
        """
        targets = self._some_targets(target)
        number = len(self.observations.sample_ids)
        positions = np.arange(number) if ids is None else positions_of(ids, self._position, "ids")
        kept = []
        for name in targets:
            fulfils = np.ones(len(positions), dtype=bool)
            for column, least in (("mu", min_mu), ("z", min_z)):
                if least is not None:
                    fulfils &= self._values(column, name)[positions] >= least
            kept.append(positions[fulfils] + self.targets.index(name) * number)
        return self.dataset.select(np.concatenate(kept).tolist())

    def discoveries(self, level: float = 0.05, target: str | None = None, side: Side = "helpful") -> Dataset:
        """Examples that stand out from the bulk; if the bulk were Gaussian, at most a share `level` of them by accident.

        Benjamini–Hochberg on the p-values of z against the empirical null, one-sided unless `side="both"`. That holds
        if the bulk is Gaussian and does nothing. Tails of μ that are heavier by nature make more accidents: measure
        their rate on a target whose labels are shuffled.

        Args:
            level (`float`, defaults to 0.05): false-discovery rate, in (0, 1).
            target (`str`, *optional*): may be left out where there is one.
            side (`"helpful"`, `"harmful"` or `"both"`, defaults to `"helpful"`): which examples are looked for.

        Returns:
            `Dataset`: columns of `dataset` and `q_value`, the least level at which the example is found; what stands
            out most first. Empty where nothing does.

        Raises:
            ValueError: a level or side outside its range, no such target, or several to choose from.
        """
        from datasets import Value

        if not 0 < level < 1:
            raise ValueError(f"level={level!r}: must be strictly between 0 and 1")
        if side not in get_args(Side):
            raise ValueError(f"side={side!r}: must be one of {', '.join(map(repr, get_args(Side)))}")
        target = self._one_target(target)
        z = self._values("z", target)
        outstanding = {"helpful": z, "harmful": -z, "both": np.abs(z)}[side]
        tested = np.flatnonzero(np.isfinite(z))
        q = np.full(len(z), np.nan)
        q[tested] = benjamini_hochberg((2 if side == "both" else 1) * _tail(outstanding[tested]))
        order = tested[np.argsort(-outstanding[tested], kind="stable")]
        order = order[q[order] <= level]
        return _with_columns(self._rows(order, target), pa.table({"q_value": q[order]}), {"q_value": Value("float64")})

    def suspects(self, k: int | None = None) -> Dataset:
        r"""Examples whose labels look wrong, the most suspicious first: by their margin, **not by influence**.

        The margin of an example is p(label) − p(the most probable other class), seen whenever the example was trained on and
        averaged over the run: the area under the margin (AUM, arXiv 2001.10528) of probabilities. Whoever looks for wrong labels
        alone finds more of them so than by any influence on itself (see the benchmark), and it costs nothing.

        Args:
            k (`int`, *optional*): how many; by default those whose margin is below 0, so that another class was on the whole more
                probable than the label.

        Returns:
            `Dataset`: `sample_id`, `margin`, `n_observations`, and joined columns.

        Raises:
            ValueError: k below 1, or the run saw no margins: a language model, a loss of one's own without logits, a report of an
                earlier version.
        """
        from datasets import Value

        if k is not None and k < 1:
            raise ValueError(f"k={k!r}: must be at least 1")
        margin = self.observations.mean_margin()
        order = np.argsort(margin, kind="stable")  # NaN last
        order = order[np.isfinite(margin[order])]
        if not len(order):
            raise ValueError(
                "suspects: the run saw no margins, as only classifiers with one label an example have them; look at top() of "
                "target='self' instead"
            )
        order = order[: (margin < 0).sum() if k is None else k]
        rows = self._rows(order, self.targets[0]).select_columns(["sample_id", "n_observations", *self._joined])
        return _with_columns(rows, pa.table({"margin": margin[order]}), {"margin": Value("float64")})

    # Groups

    def group(
        self,
        by: Groups,
        target: str | Sequence[str] | None = None,
        method: Method = "accumulated",
        *,
        confidence: float | None = None,
        n_resamples: int = 1000,
        block_length: int | None = None,
        seed: int = 0,
    ) -> Dataset:
        r"""μ of groups of examples, with moving-block bootstrap intervals over the steps.

        `"accumulated"` is the μ of the class, with the group's own signal δ_t(S), which is that of removing its
        examples together. `"composed"` takes the same δ_t and σ_t. The two-sample methods `"gaussian"`, `"auc"` and
        `"max_abs"` compare, over the steps that contain the group, the batch's gain m_t(B) with what it would have
        been without it, m_t(B) − δ_t(S); their μ is that **of one step**, and smaller. All of them are in
        [`~hf_unlearn.tradeoff.estimate.estimate_mu`], which says how biased each is.

        Signal and noise of a step are resampled together, with the same blocks for every group, so the differences
        between groups are comparable too. Intervals of `"accumulated"` are as those of examples (see the class), those of the other methods
        cover the noise of the estimate alone. μ is no privacy guarantee.

        Args:
            by: name of a column that [`~InfluenceReport.join`] attached (a group per value, NaN being one; rows without
                one are in none), a mapping from names to sample ids, or the sample ids of one group.
            target (`str` or list of `str`, *optional*): all of them if left out.
            method (`str`, defaults to `"accumulated"`): see above.
            confidence (`float`, *optional*): of the intervals; defaults to the report's.
            n_resamples (`int`, defaults to 1000), block_length (`int`, *optional*), seed (`int`, defaults to 0): of
                the bootstrap.

        Returns:
            `Dataset`: a row per target and group: `group`, `target`, `mu`, `mu_low`, `mu_high`, `n_examples`,
            `n_observations` (steps that contain the group). μ is NaN for a group that was never seen, the bounds too
            with fewer than 4 steps; the two-sample methods need 4 steps that contain the group.

        Raises:
            ValueError: an unknown, repeated or missing id, an empty group, no such column, method or target, or a
                report on every example's own loss (`"self"`).
        """
        from datasets import Dataset

        confidence = self.confidence if confidence is None else confidence
        _check_confidence(confidence)
        if method not in get_args(Method):
            raise ValueError(f"method={method!r}: must be one of {', '.join(map(repr, get_args(Method)))}")
        targets = self._some_targets(target)
        names, members = self._members(by)
        estimates, present = group_mu(
            self._used,
            members,
            [self.targets.index(name) for name in targets],
            method,
            scale=self.scale / gain_of(self.manifest),
            confidence=confidence,
            n_resamples=n_resamples,
            block_length=block_length,
            seed=seed,
        )
        mu, low, high = estimates.transpose(2, 1, 0).reshape(3, -1)
        if method == "accumulated":
            low, high = widened(mu, low, high, self.manifest, confidence)
        return Dataset.from_dict(
            {
                "group": names * len(targets),
                "target": [name for name in targets for _ in names],
                "mu": mu,
                "mu_low": low,
                "mu_high": high,
                "n_examples": [len(positions) for positions in members] * len(targets),
                "n_observations": np.tile(present, len(targets)),
            }
        )

    def _members(self, by: Groups) -> tuple[list[str], list[np.ndarray]]:
        return members_of(by, self._position, self.dataset.select_columns(self._joined))

    # The training data

    def join(self, dataset: Dataset, id_column: str, columns: str | Sequence[str]) -> InfluenceReport:
        """A report with columns of the training data (topic, poisoned, image …) beside μ, matched by id.

        Args:
            dataset (`Dataset`): has a row for every sample id; other rows do not matter.
            id_column (`str`): in it.
            columns (`str` or list of `str`): to be attached.

        Raises:
            ValueError: no such column, a name that the report uses, ids that occur twice, or sample ids that are
                not there.
        """
        columns = [columns] if isinstance(columns, str) else list(columns)
        for column in (id_column, *columns):
            if column not in dataset.column_names:
                raise ValueError(f"column {column!r} is not in the dataset (it has {', '.join(dataset.column_names)})")
        for column in columns:
            if column in self.dataset.column_names:
                raise ValueError(f"columns: the report has a column {column!r} already; rename the dataset's")
        row_of: dict[Any, int] = {}
        for row, sample_id in enumerate(dataset.with_format(None)[id_column][:]):
            if row_of.setdefault(sample_id, row) != row:
                raise ValueError(f"id_column={id_column!r}: {sample_id!r} occurs twice")
        missing = [sample_id for sample_id in self._position if sample_id not in row_of]
        if missing:
            raise ValueError(
                f"id_column={id_column!r}: sample {missing[0]!r} is not in the dataset ({len(missing)} of "
                f"{len(self._position)} are not); is it a report from another run?"
            )
        rows = [row_of[sample_id] for sample_id in self._position] * len(self.targets)
        attached = dataset.select_columns(columns).with_format("arrow")[rows]
        return replace(self, dataset=_with_columns(self.dataset, attached, dataset.features))


def _z_scores(mu: np.ndarray) -> np.ndarray:
    """z of the finite μ among all of them, NaN for the others."""
    z, finite = np.full(len(mu), np.nan), np.isfinite(mu)
    if finite.sum() > 1:
        z[finite] = z_scores(mu[finite])
    return z


def _tail(z: np.ndarray) -> np.ndarray:
    """P(Z > z) under the null. Its scale is estimated by the interquartile range of n values, with a relative variance
    of 1.36 / n: as that of a standard deviation with 0.367 n degrees of freedom, so Student's law rather than the
    Gaussian one. (Of 100 values that do nothing, the Gaussian one has discoveries at level 0.05 in 12 % of runs, this
    in 4.5 %.)
    """
    return stdtr(0.367 * np.isfinite(z).sum(), -z)


def _with_columns(dataset: Dataset, columns: pa.Table, features: Mapping[str, Any]) -> Dataset:
    """In Arrow and in memory, so that images stay as they are encoded."""
    from datasets import Dataset, DatasetInfo, Features
    from datasets.table import InMemoryTable

    table = dataset.with_format("arrow")[:].replace_schema_metadata(None)
    for name in columns.column_names:
        table = table.append_column(name, columns[name])
    features = Features({**dataset.features, **{name: features[name] for name in columns.column_names}})
    return Dataset(InMemoryTable(table), info=DatasetInfo(features=features))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r}: must be strictly between 0 and 1, such as 0.95")
