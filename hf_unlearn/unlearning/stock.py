"""Features of the stock Trainer that look into a batch of two parts, begin again, or make the model anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, enable_full_determinism, set_seed
from transformers.trainer_utils import align_special_tokens

from ..files import first_line
from ..parameters.reference import ReferencePoint
from ..training.collators import ALTERNATE, RawCollator
from .checks import check_trainable
from .guard import GuardState
from .objective import ObjectiveMixin


BY_LENGTH = ("group_by_length", "batch_rebalance")


class StockFeaturesMixin:
    """What an unlearning trainer does so that features of the stock one mean the same as there."""

    # Batches of two parts

    def _get_train_sampler(self, train_dataset=None):
        """By the forget rows, whose columns and lengths it may look at; the length of a raw text is that of its characters."""
        rows, column = self.drawn_rows, self.args.length_column_name
        collator = getattr(self.data_collator, "collator", self.data_collator)
        is_raw = isinstance(collator, RawCollator) and collator.column == "text" and isinstance(rows, Dataset)
        if self.args.train_sampling_strategy in BY_LENGTH and is_raw and column not in rows.column_names:
            rows = rows.add_column(column, [len(text) for text in rows["text"]])
        return super()._get_train_sampler(rows)

    def _track_num_input_tokens(self, inputs) -> None:
        for part in parts_of(inputs):
            super()._track_num_input_tokens(part)

    def floating_point_ops(self, inputs) -> int:
        return sum(super(StockFeaturesMixin, self).floating_point_ops(part) for part in parts_of(inputs))

    def _check_batches(self) -> None:
        """Whether the collator makes of each dataset what the losses need.

        Raises:
            ValueError: naming the dataset.
        """
        datasets = {name: getattr(self, name) for name in ("forget_dataset", "retain_dataset", "heldout_dataset")}
        if self.args.guard and isinstance(self.eval_dataset, dict):
            datasets["eval_dataset['retain']"] = self.eval_dataset.get("retain")
        given = {name: rows for name, rows in datasets.items() if rows is not None}
        label = (self.label_names or ["labels"])[0]
        for name, rows in given.items() if type(self).predictions is ObjectiveMixin.predictions else ():
            raw = " (UnlearnSFTTrainer takes raw texts)" if self.is_causal_lm else ""
            try:
                collate = self._get_collator_with_removed_columns(self.data_collator)
                with torch.random.fork_rng(devices=[]):
                    batch = collate([self._pruned(rows)[0]])
            except Exception as error:  # whatever a collator may raise
                raise ValueError(
                    f"{name}: cannot be collated ({type(error).__name__}: {first_line(error)}); it needs the columns of "
                    f"training{raw}"
                ) from error
            if label not in batch:
                raise ValueError(
                    f"{name}: gives batches without {label!r}; the dataset or the collator must provide it{raw}"
                )
        strategy, rows = self.args.train_sampling_strategy, self.forget_dataset
        if strategy in BY_LENGTH and rows is not None:
            columns = rows[0].keys() if isinstance(rows[0], Mapping) else ()
            if not {"input_ids", "text", self.args.length_column_name} & set(columns):
                raise ValueError(
                    f"train_sampling_strategy={strategy!r}: the forget examples are no texts; use 'random'"
                )

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As [`~transformers.Trainer.evaluate`], except that the random state stays: evaluating changes no training run."""
        with torch.random.fork_rng(self._random_devices):
            return super().evaluate(*args, **kwargs)

    # A run that begins again

    _begins_as_original = True  # a method may have done something before the first step

    def _inner_training_loop(self, batch_size: int | None = None, **kwargs):
        """With `auto_find_batch_size` it is called again when memory was short, maybe after steps that have moved the model."""
        self._micro_step, self._terms, self._terms_count = 0, {}, 0
        if self.args.auto_find_batch_size:
            if self._begun is None:
                moved = kwargs.get("resume_from_checkpoint") or not self._begins_as_original
                point = ReferencePoint.capture(self.model) if moved else self.reference
                self._begun = point, copy.deepcopy((self.guard.state if self.guard else None, self.forgetting.state()))
            else:
                self._begun[0].restore(self.model)
                self.model.zero_grad()
                guard_state, state = copy.deepcopy(self._begun[1])
                self.forgetting.begin(state)
                if self.guard:
                    self.guard.state = guard_state
                if self.optimizer is not None:
                    getattr(self.optimizer, "optimizer", self.optimizer).state.clear()
        return super()._inner_training_loop(batch_size, **kwargs)

    # A model that is made anew

    def _align_special_tokens(self) -> None:
        """As the stock trainer does when training begins; here forward passes come before that."""
        tokenized = isinstance(self.processing_class, PreTrainedTokenizerBase | ProcessorMixin)
        if tokenized and hasattr(self.model, "config"):
            align_special_tokens(self.model, self.processing_class)

    def _with_adapter(self, model, peft_config):
        if peft_config is None:
            return model
        from peft import get_peft_model

        return get_peft_model(model, copy.deepcopy(peft_config))

    def _new_model(self, trial: Any) -> None:
        """What `model_init` makes takes the place of the model, for this run or this trial of a search."""
        self._hp_search_setup(trial)  # its values are what the anchor is built with
        (enable_full_determinism if self.args.full_determinism else set_seed)(self.args.seed)
        self.model = self._with_adapter(self.call_model_init(trial), self._peft_config)
        if self.place_model_on_device:
            self._move_model_to_device(self.model, self.args.device)
        self.model_wrapped = self.model
        self.optimizer = self.lr_scheduler = self.reference = self.anchor = None
        self.heldout_loss = self.args.heldout_loss
        self._batchnorms = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        for cached in ("family", "_vocabulary"):
            self.__dict__.pop(cached, None)
        self._settle_forget_loss()
        self._align_special_tokens()
        check_trainable(self.model, self.args)
        if self.guard:
            self.guard.state = GuardState()

    @contextmanager
    def _model_is_made(self) -> Iterator[None]:
        """The stock trainer would make another one."""
        make, self.model_init = self.model_init, None
        try:
            yield
        finally:
            self.model_init = make

    def save_model(self, *args, **kwargs) -> None:
        if self.forget_dataset is None:
            raise ValueError("forget_dataset: missing, so nothing was unlearned and there is nothing to save")
        super().save_model(*args, **kwargs)


class NewPairs(TrainerCallback):
    """Tells the training data which epoch it is. accelerate 1.15 does so in one process only, and not where a resumed run
    skips batches.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.dataset.set_epoch(int(state.epoch))


class Routed:
    """A mixture of experts as a callable that keeps the load-balancing loss of every pass."""

    def __init__(self, model: Callable):
        self.model = model
        self.losses: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.model(*args, **kwargs, output_router_logits=True)
        self.losses.append(outputs.aux_loss)
        return outputs


def parts_of(inputs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Forget and retain part of a batch, with the answers wanted instead, or the whole of a plain one."""
    parts = [part for part in inputs.values() if isinstance(part, Mapping)]
    return [*parts, *(part[ALTERNATE] for part in parts if ALTERNATE in part)] or [inputs]
