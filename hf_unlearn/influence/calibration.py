"""What μ's unit is measured by: examples and initialisations that the sweep looks at, and further trainings."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from copy import copy

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Subset
from transformers import Trainer

from ..parameters.reference import trainable_parameters
from .report.kept import burnt_in
from .report.observations import Observations
from .report.records import read_observations
from .report.shuffling import panel_of
from .report.unit import ORDER_ONLY
from .targets import Batch


LEFT_OUT = 0.05  # share of the examples
ENOUGH_RUNS = 4  # to leave examples out in some of them


class CalibratingMixin:
    """Measures the unit of the trainer that it is mixed into."""

    def _initial_parameters(self, draws: int = 4) -> Iterator[list[Tensor]]:
        """What `model_init` may give to train, with seeds of its own."""
        for draw in range(draws):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.args.seed + 1 + draw)
                parameters = trainable_parameters(self.call_model_init())
            yield [parameters[name] for name in self._parameters]

    def _panel_rows(self) -> list[Batch]:
        """The examples that σ is read off, in batches as large as those of training."""
        rows = self.train_dataset
        rows = self._remove_unused_columns(rows) if isinstance(rows, Dataset) else rows
        chosen, size = panel_of(len(self.sample_ids), self.args.seed), self._train_batch_size
        with torch.random.fork_rng(devices=[]):
            return [
                self._collate([rows[row] for row in chosen[first : first + size]])
                for first in range(0, len(chosen), size)
            ]

    def _calibrate(self) -> None:
        """Measure σ of the targets' losses over whole trainings and, of `in_run`, how much of what it saw is there in the end.

        For that every second run leaves out a twentieth of the examples, where there are four or more. (What `propagated` carries to the
        end is right up to first order, and was not made better by the gain of eight runs.)
        """
        observations, _ = read_observations(self.records_dir)
        used = observations.since(burnt_in(self.args.burn_in, observations))
        runs, generator = self.args.n_calibration_runs, np.random.default_rng([self.args.seed, 3])
        can = self.observation == "in_run" and runs >= ENOUGH_RUNS and not used.is_self
        leaves_out = [can and run % 2 == 1 for run in range(runs)]
        groups = [influential(used, generator) if leaves else np.zeros(0, dtype=int) for leaves in leaves_out]
        losses = np.stack([self._losses_without(group, run) for run, group in enumerate(groups)])
        found = calibrated(used, losses, groups)
        if self._recorder is not None:
            self._recorder.describe(**found)

    def _losses_without(self, group: np.ndarray, run: int) -> np.ndarray:
        """`[targets]`: after a training of as many steps as the run's, from another seed, without the examples of a group."""
        rows = self.train_dataset
        if len(group):
            kept = np.setdiff1d(np.arange(len(self.sample_ids)), group).tolist()
            rows = rows.select(kept) if isinstance(rows, Dataset) else Subset(rows, kept)
        with tempfile.TemporaryDirectory() as folder:
            args = copy(self.args)
            args.output_dir, args.seed, args.n_calibration_runs = folder, self.args.seed + 1 + run, 0
            args.data_seed, args.save_strategy, args.report_to, args.eval_strategy = None, "no", [], "no"
            args.disable_tqdm, args.push_to_hub, args.load_best_model_at_end = True, False, False
            args.max_steps = self.state.global_step
            trainer = Trainer(
                model_init=self.model_init, args=args, train_dataset=rows, data_collator=self.data_collator
            )
            trainer._signature_columns, trainer.label_names = self._signature_columns, self.label_names
            trainer.train()
            return self._target_sets.losses(trainer.model).double().cpu().numpy()


def influential(observations: Observations, generator: np.random.Generator) -> np.ndarray:
    """Positions of the twentieth of the examples that together help a random mixture of the targets most."""
    signals, examples = observations.signals(), len(observations.sample_ids)
    totals = np.stack([np.bincount(observations.example, column, examples) for column in signals.T], axis=1)
    mixture = generator.normal(size=totals.shape[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        helps = np.nan_to_num(totals / observations.sigma) @ mixture
    return np.argsort(-helps, kind="stable")[: max(1, round(LEFT_OUT * examples))]


def calibrated(
    observations: Observations, losses: np.ndarray, groups: Sequence[np.ndarray]
) -> dict[str, float | str | None]:
    """What calibration runs say of a run's unit.

    Args:
        observations (`Observations`): those that count.
        losses (`[runs, targets]`): after trainings with other seeds.
        groups (sequence of `[size]` int): the examples that each was trained without; none in two at least.

    Returns:
        `dict`: `scale`, that multiplies σ; `unit_error`, the standard deviation of log(gain / scale); and, if examples were left out,
        `gain`, the slope of what that did to the losses over what it should have, in units of σ; or why there is none.
    """
    whole = losses[[not len(group) for group in groups]]
    own = observations.sigma
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = whole.var(0, ddof=1) / own**2
    known = np.isfinite(ratio) & (own > 0)
    scale = float(np.sqrt(ratio[known].mean())) if known.any() else 1.0
    # Targets of one run go up and down together: as many degrees of freedom as the root of their number.
    error = 1 / np.sqrt(2 * (len(whole) - 1) * np.sqrt(max(1, known.sum())))
    without = [group for group in groups if len(group)]
    if not without or not known.any():
        return {"scale": scale, "unit_error": float(error)}
    unit = scale * own[known]
    expected = observations.group_signals(without).sum(1)[:, known] / unit
    found = (losses[[len(group) > 0 for group in groups]] - whole.mean(0))[:, known] / unit
    gain = float((expected * found).sum() / np.square(expected).sum())
    # The losses have a variance of 1 and their reference 1 / runs; what is more is that signals are no exact multiple of the truth.
    rest = max(np.square(found - gain * expected).sum() / max(1, found.size - 1), 1 + 1 / len(whole))
    slack = float(np.sqrt(rest / np.square(expected).sum()))
    if gain <= 2 * slack:
        why = f"{len(losses)} calibration runs could not tell how much of a gain is left in the end; more of them may"
        return {"scale": scale, "unit_error": float(error), ORDER_ONLY: why}
    return {"scale": scale, "gain": gain, "unit_error": float(np.hypot(error, slack / gain))}
