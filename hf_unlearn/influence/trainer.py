"""`FINEMixin` and `InfluenceTrainer`: one ordinary training run that tells what its examples did."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..data import LABEL_COLUMNS, looks_of
from ..hub.origin import origin
from ..parameters.reference import trainable_parameters
from ..parameters.sharding import is_shared
from ..training.checks import check_in_memory, check_is_not_original
from ..training.collators import RawCollator, raw_collator
from ..training.models import LoadsByName, is_causal_lm, is_encoder_decoder, load_model, ready_quantised
from ..training.runs import RunMixin
from ..training.sharing import WholeAtFirstMixin
from .calibration import CalibratingMixin
from .checks import check_arguments, check_model, sample_ids_of, target_sets_of
from .config import InfluenceConfig
from .in_run.ghost import GhostRecorder
from .propagated.optimizers import FlatOptimizer
from .propagated.sweep import Sweep
from .propagated.trajectory import Trajectory
from .report.kept import RECORDS
from .report.records import read_observations
from .report.report import InfluenceReport
from .report.shuffling import Panel, variance_of_start
from .report.writer import Recorder
from .step import RecordingMixin


logger = logging.get_logger(__name__)

MAX_GIGABYTES = 8  # of memory in a sweep
ONLY_IN_RUN = ("preconditioned", "layers", "target_rank")


class FINEMixin(RecordingMixin, CalibratingMixin, WholeAtFirstMixin, RunMixin, LoadsByName):
    """Gives a Trainer a record of what each example did to each target.

    Training is as it would be without: the same batches, the same updates (but for rounding where [`FINETrainer`] trains the head).
    Before it starts and again on the way it is looked at whether `compute_loss`, a subclass's or a `compute_loss_func=` too, is the mean of the examples'
    own losses, or a sum of them with weights of its own; a subclass with another loss overrides `per_example_loss`.
    """

    _method = "influence"
    _config_class: type = InfluenceConfig
    _tag_names = ["hf_unlearn", "influence"]

    def __init__(
        self,
        model=None,
        args=None,
        data_collator: Callable | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *,
        target_dataset=None,
        target: Literal["self"] | None = None,
        peft_config=None,
        **kwargs,
    ):
        name = type(self).__name__
        args = args if args is not None else self._config_class(output_dir="influence")
        if not isinstance(args, self._config_class):
            raise ValueError(f"args: {name} needs {self._config_class.__name__}, got {type(args).__name__}")
        check_arguments(args, train_dataset, target_dataset, target, kwargs)
        base_model = getattr(getattr(model, "config", None), "_name_or_path", None)
        if isinstance(model, str | os.PathLike):
            model, processing_class, base_model = load_model(model, args, processing_class, any_head=True)
        if model is not None:  # which model_init makes
            check_in_memory(model)
        check_is_not_original(args.output_dir, base_model)
        self._originals = [origin(base_model)]
        train_dataset = self._readable(train_dataset, args, kwargs)
        sample_ids = sample_ids_of(train_dataset, args.id_column)
        sets = {} if target_dataset is None else target_sets_of(target_dataset)
        stock = self._stock_arguments(model, data_collator, train_dataset, processing_class, peft_config, sample_ids)
        with ready_quantised(self, model):
            super().__init__(
                args=args, eval_dataset=eval_dataset, processing_class=processing_class, **stock, **kwargs
            )  # fmt: skip
        check_model(self)
        self.reads_labels = is_encoder_decoder(self.model)
        self.is_causal_lm = is_causal_lm(self.model) and not self.reads_labels
        self.target: str | None = target
        self.observation = self._choose_observation()
        self.sample_ids = self._prepared_ids(sample_ids)
        self.target_sets = {target: self._prepared(rows, target) for target, rows in sets.items()}
        self._parameters = trainable_parameters(self.model)
        self._ghost = self._build_ghost() if self.observation == "in_run" else None
        self._recorder: Recorder | None = None
        self._trajectory: Trajectory | None = None
        self._target_gradients: Tensor | None = None
        self._normalised_by: str | None = None
        self._first_step, self._largest_gradient = 0, 0.0
        self._micro: list[tuple[Tensor, ...]] = []
        self._begun = False
        self._check_batches()
        self.add_callback(_Observer(self))

    # What the stock trainer gets

    def _stock_arguments(self, model, data_collator, train_dataset, processing_class, peft_config, sample_ids):
        raise NotImplementedError

    def _readable(self, train_dataset, args, kwargs):
        return train_dataset

    def _prepared(self, dataset, name: str):
        return dataset

    def _prepared_ids(self, sample_ids: list) -> list:
        return sample_ids

    def _choose_observation(self) -> str:
        chosen = self.args.observation
        if chosen is None:
            many = self.args.world_size > 1 or self.is_fsdp_enabled or self.target == "self"
            chosen = "in_run" if many or self.is_causal_lm or self.reads_labels else "propagated"
        other, unused = {"in_run": ("propagated", ("last_steps",)), "propagated": ("in_run", ONLY_IN_RUN)}[chosen]
        if given := [name for name in unused if getattr(self.args, name)]:
            raise ValueError(
                f"{given[0]}: observation={chosen!r} does not use it; leave it out, or set observation={other!r}"
            )
        if chosen == "propagated" and (self.args.world_size > 1 or self.is_fsdp_enabled):
            raise ValueError("observation='propagated': runs in one process only; use 'in_run' with several")
        if chosen == "propagated" and self.args.fp16:
            raise ValueError(
                "fp16: its scaler skips steps, which the sweep cannot take again; use bf16 or observation='in_run'"
            )
        low = next((p.dtype for p in self.model.parameters() if p.requires_grad and p.dtype.itemsize < 4), None)
        if chosen == "propagated" and low is not None:
            raise ValueError(
                f"observation='propagated': needs float32 parameters, the model's are {low}; use 'in_run'"
            )
        if chosen == "propagated" and self.args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end: the sweep starts from the end of the run; set it to False")
        if chosen == "propagated" and self.target == "self":
            size = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            if (gigabytes := 4e-9 * len(self.train_dataset) * size) > MAX_GIGABYTES / 2:
                raise ValueError(
                    f"observation='propagated': with target='self' it would hold {gigabytes:.0f} GB, a gradient of every example; "
                    "use 'in_run'"
                )
        return chosen

    # Training and resuming

    @property
    def records_dir(self) -> Path:
        """Where the observations of the run lie; private, since they tell of the training data."""
        return self.private_dir / RECORDS

    def _train(self, checkpoint: str | None, **kwargs):
        self._recorder, self._trajectory, self._noted, self._micro, self._is_swept = None, None, False, [], False
        self._normalised_by, self._largest_gradient, self._weighs = None, 0.0, False
        self._target_sets = self._targets()
        self._begin_as_first()
        try:
            if self._ghost is not None:
                self._ghost.attach()
            result = super()._train(checkpoint, **kwargs)
        finally:
            if self._ghost is not None:
                self._ghost.detach()
            self._target_gradients, self._micro = None, []
            if self._recorder is not None:
                self._recorder.flush()
        self.accelerator.wait_for_everyone()  # for the records of the first process
        if self._trajectory is not None:
            self._propagate()
        if self.args.n_calibration_runs:
            self._calibrate()
        return result

    def _begin(self) -> None:
        """When the optimiser is there and the number of steps is known."""
        step, steps = self.state.global_step, self.state.max_steps
        self._first_step = step
        if self.args.preconditioned and not isinstance(self._inner_optimizer, torch.optim.Adam | torch.optim.AdamW):
            kind = type(self._inner_optimizer).__name__
            raise ValueError(f"preconditioned: needs Adam or AdamW of torch, and optim is {kind}; set it to False")
        if step:
            manifest = self._check_records()
            # Else its steps are to be carried back through, and they are gone.
            self._is_swept = manifest.get("swept") == step and (step >= steps or manifest["steps"] == steps)
        if self.model_init is not None:  # Trainer made the model anew
            self._parameters = trainable_parameters(self.model)
            if self._ghost is not None:
                self._ghost.detach()
                self._ghost = self._build_ghost()
                self._ghost.attach()
        if is_shared(self.model):  # from now on
            self._parameters = trainable_parameters(self.model)
            self._ghost.share(self._parameters)
        if self.observation == "propagated" and not self._is_swept:
            self._flat_optimizer = FlatOptimizer(self._inner_optimizer, list(self._parameters.values()))
            # What is not kept of the states is computed again, a segment at a time, and a whole segment is held at once: so room on
            # disk and room in memory are one choice, and a run that fits neither is refused before it is trained.
            start = max(0, steps - self.args.last_steps) if self.args.last_steps else 0
            vectors = 1 + len(self._flat_optimizer.names)
            each = 4 * vectors * sum(p.numel() for p in self._parameters.values())
            segment = max(1, -(-(steps - start) * each // int(self.args.trajectory_gigabytes * 2**30)))
            if (gigabytes := 1e-9 * segment * each) > MAX_GIGABYTES:
                raise ValueError(
                    f"trajectory_gigabytes={self.args.trajectory_gigabytes}: leaves {segment} steps to be computed again at once, which "
                    f"takes {gigabytes:.0f} GB of memory; raise it, set last_steps, or use observation='in_run'"
                )
            folder, limit = self.private_dir / "trajectory", int(max(1, self.args.trajectory_gigabytes) * 2**30)
            self._trajectory = Trajectory(folder, start=start, segment=segment, steps=steps, limit=limit)
            if step:
                kept = {int(file.stem.split("-")[1]) for file in self._trajectory.folder.glob("step-*.safetensors")}
                if missing := set(range(start, step)) - kept:
                    raise ValueError(
                        f"resume_from_checkpoint: step {min(missing)} of the run is not in {str(self._trajectory.folder)!r}, so "
                        "nothing can be carried back through it; train again from the start"
                    )
        self.accelerator.wait_for_everyone()  # others may still read the records that the first one cuts
        if self.is_world_process_zero():
            if step:  # rows of a sweep are made again
                kept_steps = step if self._is_swept or self.observation == "in_run" else 0
                self._recorder = Recorder.resume(self.records_dir, self.sample_ids, kept_steps)
            else:
                run_id = uuid.uuid4().hex
                about = {"run_id": run_id, "looks": looks_of(self.train_dataset, run_id), **self._manifest()}
                self._recorder = Recorder(self.records_dir, about, self.sample_ids)
        if self._trajectory is not None:
            self._trajectory.truncate(step) if step else self._trajectory.clear()
        self._begun = True

    @property
    def _is_over(self) -> bool:
        return super()._is_over or self._is_swept

    def _check_records(self) -> dict[str, Any]:
        """The manifest of the records, which are of the run that is resumed.

        Raises:
            ValueError: there are none, or they are of other targets or another training set.
        """
        observations, manifest = read_observations(self.records_dir)
        own = self._manifest()
        for name in ("targets", "observation", "settings"):
            if manifest[name] != own[name]:
                raise ValueError(
                    f"resume_from_checkpoint: the run was started with {name} {manifest[name]}, this is {own[name]}; resume it as "
                    "it was, or start a new one"
                )
        same_ids = observations.sample_ids.tolist() == list(self.sample_ids)  # if not, the recorder says so
        if same_ids and manifest.get("looks") not in (None, looks_of(self.train_dataset, manifest["run_id"])):
            raise ValueError(
                "resume_from_checkpoint: the training set has other rows than the run was started with; resume it with the same, or "
                "start a new one"
            )
        return manifest

    def _save_checkpoint(self, model, trial):
        if self._recorder is not None:
            self._recorder.flush()  # before there is a checkpoint to resume from, that could lack them
        super()._save_checkpoint(model, trial)
        self._target_gradients = None  # a run that is resumed here has to look anew, and so this one does too

    def _manifest(self) -> dict[str, Any]:
        names = (
            "preconditioned",
            "target_every",
            "target_batch_size",
            "target_window",
            "last_steps",
            "layers",
            "target_rank",
        )
        optimizer = type(self._inner_optimizer).__name__
        return {
            "targets": ["self"] if self.target == "self" else list(self.target_sets),
            "observation": self.observation,
            "optimizer": optimizer,
            "steps": self.state.max_steps,
            "burn_in": self.args.burn_in,
            "seed": self.args.seed,
            "settings": {name: getattr(self.args, name) for name in names},
        }

    def _propagate(self) -> None:
        if self.state.global_step <= self._trajectory.start:
            raise ValueError(
                f"last_steps={self.args.last_steps}: the run stopped at step {self.state.global_step}, before the last ones of "
                f"{self.state.max_steps}, so nothing of it was kept; leave last_steps out, or set max_steps to where it stops"
            )
        window = round(self.args.target_window * self.state.global_step)
        panel = None
        if self.target != "self":
            steps, start = self.state.global_step, self._trajectory.start
            panel = Panel(len(self.sample_ids), steps, self._steps_per_epoch, start)
        sweep = Sweep(
            self.model,
            self._flat_optimizer,
            self._trajectory,
            self._target_sets,
            self.per_example_loss,
            window=window,
            every=max(1, min(self.args.target_every, window // 4)),
            panel=panel,
            rows=self._panel_rows() if panel is not None else (),
            keep=self.state.global_step // 2 if self.model_init is not None else None,
        )

        sweep.run(self.state.global_step, self._recorder.add)
        self._recorder.flush()
        shuffling = panel.result() if panel is not None else None
        if panel is not None and panel.never_changes:
            logger.warning(
                "Influence: all epochs had the same order, so σ is that of trainings with another order in each, which this was not."
            )
        start = None
        if sweep.kept is not None and panel is not None and not self._trajectory.start:
            start = variance_of_start(sweep.kept, self._initial_parameters()).tolist()
        self._recorder.describe(
            shuffling=asdict(shuffling) if shuffling else None, start=start, swept=self.state.global_step
        )
        self._trajectory.clear()
        self._trajectory = None

    @property
    def _steps_per_epoch(self) -> int:
        return -(-len(self.callback_handler.train_dataloader) // self.args.gradient_accumulation_steps)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        Path(folder, "training_args.bin").unlink(missing_ok=True)  # a pickle, which nothing here needs

    # The result

    @property
    def influence(self) -> InfluenceReport:
        """What the run observed so far.

        Raises:
            ValueError: there was no run, or nothing of it was observed.
        """
        if not self._begun:
            raise ValueError(
                "influence: this trainer has not trained; call train() first (a report that was saved is loaded by "
                "InfluenceReport.load_from_disk)"
            )
        if self._recorder is not None:
            self._recorder.flush()
        return InfluenceReport.from_run(self.args.output_dir)

    def _build_ghost(self) -> GhostRecorder:
        ghost = GhostRecorder(self.model, layers=self.args.layers)
        if self.target == "self" and ghost.tied:
            name, owners = next(iter(ghost.tied.items()))
            raise ValueError(
                f"target='self': {name} is tied between two layers, and its norms cannot be told; take it out with "
                f"layers=['!{owners[0]}'], or pass a target_dataset"
            )
        return ghost


class InfluenceTrainer(FINEMixin, Trainer):
    """[`~transformers.Trainer`] that tells which training examples taught the model a behaviour.

    Args:
        model: as for `Trainer`.
        args (`InfluenceConfig`): training arguments and what is observed.
        train_dataset: as for `Trainer`; rows of raw images or texts are processed with `processing_class`.
        target_dataset (`Dataset` or `dict[str, Dataset]`): examples that show the behaviour. A column `target` tells several
            behaviours apart.
        target (`"self"`, *optional*): instead of a target set, every example is its own: which examples the model had to
            learn by heart.

    Raises:
        ValueError: naming the argument, what is wrong with it and what to do.
    """

    def _stock_arguments(self, model, data_collator, train_dataset, processing_class, peft_config, sample_ids):
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if data_collator is None:
            data_collator = raw_collator(train_dataset, processing_class)
        return {"model": model, "data_collator": data_collator, "train_dataset": train_dataset}

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            raw = [self.data_collator.column, *LABEL_COLUMNS] if isinstance(self.data_collator, RawCollator) else []
            self._signature_columns = [*self._signature_columns, *raw]


class _Observer(TrainerCallback):
    """Tells the trainer what Trainer's loop does."""

    def __init__(self, trainer: FINEMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._begin()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer._close_step()
