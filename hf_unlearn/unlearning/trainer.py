"""`UnlearnTrainer` for `Trainer`, and the loop that every unlearning method shares."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import reduce
from datasets import Dataset
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, set_seed

from ..data import LABEL_COLUMNS
from ..metrics.classification import Accuracy
from ..modes import seeded_generator
from ..parameters.anchors import Anchor
from ..parameters.reference import ReferencePoint, trainable_parameters
from ..parameters.sharding import own
from ..training.checks import check_drop_last, check_features, check_is_not_original, check_parallelism
from ..training.collators import ALTERNATE, ForgetRetainDataset, NestedCollator, RawCollator, raw_collator
from ..training.models import LoadsByName, is_causal_lm, load_model, ready_quantised, router_loss_weight
from ..training.outcome import tell_outcome
from ..training.runs import RunMixin
from ..training.texts import check_tokenized
from ..training.trackers import Trackers
from .checks import check_arguments, check_labels, check_stock_arguments, check_trainable, first_rows
from .config import UnlearnConfig
from .guard import LOOKING, Guard, GuardState, UtilityMixin
from .objective import Batch, ObjectiveMixin, takes_pairs
from .outcome import OutcomeMixin
from .saving import SavingMixin
from .sharing import SharingMixin
from .stock import NewPairs, Routed, StockFeaturesMixin


logger = logging.getLogger(__name__)

# Settings of how long a run is and of what is saved, which one that is resumed may have anew.
MAY_CHANGE = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "guard", "guard_examples",
    "guard_patience", "forget_accuracy", "utility_tolerance", "ema_decay",
)  # fmt: skip
NO_GRADIENT = (
    "model: none of its trainable parameters takes part in the loss; unfreeze others with requires_grad_(True)"
)


class UnlearnMixin(
    ObjectiveMixin, UtilityMixin, OutcomeMixin, SavingMixin, SharingMixin, RunMixin, StockFeaturesMixin, LoadsByName
):
    """Makes a Trainer forget: batches of forget (and optional retain) data, frozen reference, anchor, replay, guard,
    saving and card. A method overrides `prepared`, `task_loss`, `forget_loss`, `retain_loss`, `replay_inputs` or
    `build_anchor`, and nothing else.
    """

    _method = "unlearn"
    _title = "bounded forget loss with data-free replay"
    _paper: str | None = None
    _tag_names = ["hf_unlearn", "machine-unlearning"]
    _config_class: type = UnlearnConfig
    loss_is_scaled_for_ga = False  # our loss is a mean over the batch: Trainer divides it by the accumulation steps

    def __init__(
        self,
        model=None,
        args=None,
        data_collator: Callable | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *,
        forget_dataset=None,
        retain_dataset=None,
        heldout_dataset=None,
        peft_config=None,
        model_init: Callable | None = None,
        **kwargs,
    ):
        args = args if args is not None else self._config_class(output_dir="unlearned")
        name = type(self).__name__
        if not isinstance(args, self._config_class):
            raise ValueError(f"args: {name} needs {self._config_class.__name__}, got {type(args).__name__}")
        datasets = {
            "forget_dataset": forget_dataset,
            "retain_dataset": retain_dataset,
            "heldout_dataset": heldout_dataset,
        }
        check_arguments(
            name, args, train_dataset=train_dataset, eval_dataset=eval_dataset, data_collator=data_collator, **datasets
        )
        check_stock_arguments(args, model, model_init, **kwargs)
        if model_init is not None:
            self.model_init = model_init
            set_seed(args.seed)
            model = self.call_model_init()
        self._peft_config = peft_config
        model, processing_class, self.base_model = self._load(model, args, processing_class)
        check_is_not_original(args.output_dir, self.base_model)
        self.is_causal_lm = is_causal_lm(model)
        self.is_classifier = not self.is_causal_lm and hasattr(getattr(model, "config", None), "num_labels")
        self.forgotten_classes: list[int] = []
        if self.is_classifier:
            self.forgotten_classes = check_labels(args, model.config.num_labels, **datasets)
        set_seed(args.seed)  # an adapter begins at random
        rows = forget_dataset if forget_dataset is not None else first_rows(eval_dataset)
        stock = self._stock_arguments(model, data_collator, rows, processing_class, peft_config)
        with ready_quantised(self, model):
            super().__init__(
                args=args, train_dataset=self._readable(rows, args, kwargs), eval_dataset=eval_dataset,
                processing_class=processing_class, **stock, **kwargs,
            )  # fmt: skip
        self.model_init = model_init
        if forget_dataset is None:  # rows were there for the stock trainer, which looks at them
            self.train_dataset = None
        check_parallelism(self, "it steps or shards out of sight", shares=True)
        check_features(self)
        check_drop_last(self)
        check_trainable(self.model, args)
        self._align_special_tokens()
        self.source_dataset = forget_dataset  # as the caller passed it: what the fingerprint is taken of
        self.forget_dataset = self.train_dataset  # as the trainer prepared it
        self.retain_dataset = self._prepared(retain_dataset, "retain")
        self.heldout_dataset = self._prepared(heldout_dataset, "heldout")
        self.data_collator = NestedCollator(self.data_collator)
        self._check_batches()
        self.forget_loss_name = args.forget_loss
        if forget_dataset is not None:
            self._settle_forget_loss()
        self.reference: ReferencePoint | None = None
        self.anchor: Anchor | None = None
        self.heldout_loss = args.heldout_loss
        self.results: list = []
        self.card_values: dict[str, Any] = {}
        self._batchnorms = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        self._terms: dict[str, Tensor] = {}
        self._terms_count = 0
        self._micro_step = 0
        self._begun: tuple[ReferencePoint, tuple[GuardState | None, Any]] | None = None
        if self.compute_metrics is None and self.is_classifier:
            self.compute_metrics = Accuracy()
        self.trackers = Trackers(self)
        self.add_callback(self.trackers)
        self.guard = Guard(self) if args.guard else None
        self.add_callback(NewPairs())
        if self.guard:
            self.add_callback(self.guard)

    # What the stock trainer gets

    def _load(self, model, args, processing_class) -> tuple[Any, Any, str | None]:
        return load_model(model, args, processing_class)

    def _stock_arguments(self, model, data_collator, forget_dataset, processing_class, peft_config) -> dict[str, Any]:
        raise NotImplementedError

    def _readable(self, forget_dataset, args, kwargs):
        return forget_dataset

    def _prepared(self, dataset, name: str):
        return dataset

    # Batches

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            collator = getattr(self.data_collator, "collator", self.data_collator)
            raw = [collator.column, *LABEL_COLUMNS] if isinstance(collator, RawCollator) else []
            paired = [ALTERNATE] if takes_pairs(self.args.forget_loss) else []
            self._signature_columns = [*self._signature_columns, "forget", "retain", *paired, *raw]

    def _pruned(self, dataset):
        return self._remove_unused_columns(dataset) if isinstance(dataset, Dataset) else dataset

    def get_train_dataloader(self) -> DataLoader:
        """Batches `{"forget": …, "retain": …}`, the second only where there is something to keep."""
        forget, retain = self._training_rows()
        return self._get_dataloader(
            dataset=ForgetRetainDataset(forget, retain, each=self.args.retain_per_forget, seed=self.args.seed),
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=lambda _: self._get_train_sampler(),
            is_training=True,
        )

    @property
    def drawn_rows(self):
        """What the steps draw from, each row once an epoch."""
        return self.forget_dataset

    def _training_rows(self) -> tuple[Any, Any]:
        """What is trained on: to forget, and to keep or None."""
        return self._pruned(self.forget_dataset), None if self.retain_dataset is None else self._pruned(
            self.retain_dataset
        )

    def _batches(self, dataset, limit: int | None) -> Iterator[Batch]:
        """At most `limit` examples, drawn by the seed, on the device; every process sees the same."""
        # Drawn, not the first ones: datasets are often sorted by class.
        drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.args.seed))
        rows = drawn[:limit].sort().values.tolist()
        part = dataset.select(rows) if isinstance(dataset, Dataset) else Subset(dataset, rows)
        collator = self._get_collator_with_removed_columns(self.data_collator)
        size = max(self.args.eval_batch_size, self._train_batch_size)  # a look takes less memory than a step
        loader = DataLoader(self._pruned(part), batch_size=size, collate_fn=collator)
        for batch in loader:
            yield self._prepare_inputs(batch)

    def _generator(self, *key: int) -> torch.Generator:
        """Randomness as a function of the seed and `key` alone, so that a resumed run draws the same."""
        process = 0 if LOOKING in key else self.args.process_index  # all look at the same, and compute the same Fisher
        return seeded_generator(self.args.device, self.args.seed, process, *key)

    # The step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The sum of forget, retain and replay loss, each by its weight; on a plain batch the task's own."""
        if "forget" not in inputs:  # evaluation: a plain batch, the task's own loss
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        if self.args.bn == "frozen":
            for module in self._batchnorms:  # Trainer calls model.train() before every step
                module.eval()
        router_weight = router_loss_weight(self)
        model = Routed(model) if router_weight else model
        generator = self._generator(self.state.global_step, self._micro_step)
        forget = self.prepared(inputs["forget"], generator)
        keeps = "retain" in inputs and (self.forgetting.watches_kept or self.forgetting.retain_weight)
        retain = self.prepared(inputs["retain"], generator) if keeps else None
        replayed = self.replay_inputs(forget, generator) if self.replay_weight else None
        with self.seen_together(model, forget, replayed):
            terms = {"forget": (self.args.forget_weight, self.forget_loss(model, forget).mean())}
            if keeps:
                terms["retain"] = (self.forgetting.retain_weight, self.retain_loss(model, retain).mean())
                self.forgetting.saw(terms["retain"][1])
            if replayed is not None:
                terms["replay"] = (self.replay_weight, self.replay_loss(model, replayed).mean())
        if router_weight and model.losses:
            terms["router"] = (router_weight, torch.stack(model.losses).mean())
        for name, (_, value) in terms.items():
            name = f"{name}_loss"
            self._terms[name] = self._terms.get(name, 0) + value.detach()
        self._terms_count += 1
        loss = sum(weight * value for weight, value in terms.values())
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(NO_GRADIENT)
        return loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As Trainer's, and after the last backward pass of a step the anchor's gradient."""
        if self.args.guard and self.args.bn == "train" and self._micro_step == 0:
            self._statistics = [buffer.clone() for module in self._batchnorms for buffer in module.buffers()]
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro_step += 1
        if self.accelerator.sync_gradients:
            # After the backward pass of the last micro-batch: equal to a penalty in the loss, with and without
            # accumulation and clipping. Under fp16 the gradients carry the scaler's factor, and so must this one.
            self._micro_step = 0
            if all(parameter.grad is None for parameter in trainable_parameters(self.model).values()):
                raise ValueError(NO_GRADIENT)
            scaler = self.accelerator.scaler
            scaled = scaler is not None and scaler.is_enabled()
            if self.anchor is not None:
                self.anchor.add_grad_(trainable_parameters(self.model), scaler.get_scale() if scaled else 1.0)
            if self.args.guard:
                self._refuse_non_finite(loss, check_gradients=not scaled)
            self.forgetting.stepped()
        return loss

    def _refuse_non_finite(self, loss: Tensor, check_gradients: bool) -> None:
        """Stop before the optimiser steps, with the weights of the last good step in memory and on disk."""
        finite = torch.isfinite(loss)
        if check_gradients:  # with a scaler, infinite gradients are its business: it skips the step
            gradients = [own(p.grad) for p in self.model.parameters() if p.grad is not None]
            finite = finite & torch.isfinite(torch.stack(torch._foreach_norm(gradients)).sum())
        if self.args.world_size > 1:  # one process that stopped alone would leave the others waiting
            finite = reduce(finite.int(), "sum") == self.args.world_size
        if not finite:
            if self.args.bn == "train":  # the forward pass has moved them already
                buffers = [buffer for module in self._batchnorms for buffer in module.buffers()]
                for buffer, before in zip(buffers, self._statistics, strict=True):
                    buffer.copy_(before)
            terms = ", ".join(f"{name} {value.item() / self._terms_count:.3g}" for name, value in self._terms.items())
            file = self.private_dir / "last_good.safetensors"
            ReferencePoint.capture(self.model, copy=False).save(file, write=self.args.should_save)
            best = (
                f", those of the guard's best step {self.guard.best.step} beside it in guard/"
                if self.guard.best
                else ""
            )
            raise FloatingPointError(
                f"loss or gradient is not finite at step {self.state.global_step + 1} ({terms}): nothing was updated; the "
                f"weights before it are in trainer.model and in {file}{best}; try a smaller learning_rate or "
                "forget_loss='bounded'"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the terms of the loss beside it."""
        if "loss" in logs and self._terms_count:
            terms = {name: value / self._terms_count for name, value in self._terms.items()}
            if self.anchor is not None:
                for name, value in self.anchor.value(trainable_parameters(self.model)).items():
                    terms[f"anchor_{name}"] = value
            terms |= {name: torch.tensor(value) for name, value in self.forgetting.logged().items()}
            values = self.accelerator.reduce(
                torch.stack([v.float().to(self.args.device) for v in terms.values()]), "mean"
            )
            logs.update(zip(terms, values.tolist(), strict=True))
            self._terms, self._terms_count = {}, 0
        super().log(logs, start_time)

    # Training and resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Unlearn. As [`~transformers.Trainer.train`]; `resume_from_checkpoint=True` takes the newest complete checkpoint of the run
        that `output_dir` is of.

        Raises:
            ValueError: there is nothing to forget, or the checkpoint is incomplete, of another run or of another method.
            FloatingPointError: the loss or a gradient is not finite; nothing was updated.
        """
        if self.forget_dataset is None:
            raise ValueError("forget_dataset: missing; pass the examples to forget")
        if self.model_init is not None:
            self._new_model(kwargs.get("trial"))
        self._begun = None
        return super().train(resume_from_checkpoint, **kwargs)

    def _train(self, checkpoint: str | None, **kwargs):
        self._place_whole()
        self._resuming = checkpoint is not None
        file = self.private_dir / "reference.safetensors"
        first = not checkpoint and self.reference is None
        if checkpoint:
            if not file.is_file():
                raise ValueError(
                    f"resume_from_checkpoint: {file} is missing, without which the original is not known; start again"
                )
            self.reference = ReferencePoint.load(file, self.args.device)
            self.heldout_loss = self._resumed["heldout_loss"]
            if self.guard and self._resumed["guard"]:
                self.guard.state = GuardState.from_json(self._resumed["guard"])
        else:
            if first:
                self.reference = ReferencePoint.capture(self.model)
            self.reference.save(file, write=self.args.should_save)
            if first and self.heldout_loss is None and self.heldout_dataset is not None:
                self.heldout_loss = self.mean_of(lambda batch: self.task_loss(self.model, batch), self.heldout_dataset)
        self.forgetting.begin(self._resumed["forgetting"] if checkpoint else None)
        if self.anchor is None or checkpoint:
            self.anchor = self.build_anchor()
        if self.guard and not checkpoint:  # a second run of the same trainer: what was useful is still the original
            self.guard.state = GuardState(baseline=self.guard.state.baseline)
        if first:
            self._before_steps()
        self.accelerator.wait_for_everyone()
        held = self._steps_look_back or self.anchor is not None or not file.is_file()
        self.reference = self.reference if held else ReferencePoint.load(file)  # mapped: no memory before it is asked
        with self._model_is_made():
            done = super()._train(checkpoint, **kwargs)
        if not held:
            self.reference = ReferencePoint.load(file, self.args.device).sharded_like(self.model)
        self.forgetting.ended()
        self.outcome = self.judge()
        tell_outcome(self, self.outcome_line)
        return done

    def _before_steps(self) -> None:
        """What a method does to the model before the first step of a run, once the original is known."""

    _steps_look_back = True  # whether the loss asks the original

    def _checkpoint_state(self) -> dict[str, Any]:
        guard = self.guard.state.to_json() if self.guard else None
        return {"guard": guard, "heldout_loss": self.heldout_loss, "forgetting": self.forgetting.state()}

    def _run_settings(self) -> dict[str, Any]:
        return super()._run_settings() | {
            name: getattr(self.args, name)
            for name in self._chosen()
            if name not in MAY_CHANGE and hasattr(self.args, name)  # as given: what is left out may be chosen later
        }

    def _run_rows(self) -> dict[str, Any]:
        return {"forget_dataset": self.source_dataset, "retain_dataset": self.retain_dataset}

    @property
    def _is_over(self) -> bool:
        return super()._is_over or bool(self.guard and self.guard.exhausted)


class UnlearnTrainer(UnlearnMixin, Trainer):
    """[`~transformers.Trainer`] that makes a model forget: pass `forget_dataset=` instead of `train_dataset=`.

    For image and text classifiers and causal language models. Rows may be model inputs, as for `Trainer`, or raw (`image`
    or `text` with a label), which the model's processor turns into inputs. The model is changed in place.

    Args:
        model (`PreTrainedModel` | `PeftModel` | `str` | `Path`): what is to forget. An id or a path is loaded with its processor.
        args (`UnlearnConfig`, *optional*): defaults to `UnlearnConfig(output_dir="unlearned")`.
        data_collator (callable, *optional*): as for `Trainer`.
        forget_dataset (`Dataset`): what to forget. None only to `evaluate()` or `predict()`.
        retain_dataset (`Dataset`, *optional*): data to keep; without any, data-free replay does its work.
        heldout_dataset (`Dataset`, *optional*): data the model has never seen: its mean loss is the target of
            `forget="examples"`.
        eval_dataset (`dict[str, Dataset]`, *optional*): `{"forget": …, "retain": …}`, for `evaluate()`; the guard takes
            `"retain"` as utility.
        processing_class (*optional*): image processor or tokenizer; saved with the model.
        peft_config (`peft.PeftConfig`, *optional*): unlearn with a new adapter.
        model_init (callable, *optional*): instead of `model`: makes a new one, the reference of its own run, for every `train()`
            and every trial of `hyperparameter_search()`.
        kwargs: anything else `Trainer` takes.

    Raises:
        ValueError: see the message, which names the argument and the fix. No file was written.
    """

    def _stock_arguments(self, model, data_collator, forget_dataset, processing_class, peft_config) -> dict[str, Any]:
        if peft_config is not None:
            from peft import PeftModel

            if isinstance(model, PeftModel):
                raise ValueError("peft_config: the model has an adapter already; pass one or the other")
            model = self._with_adapter(model, peft_config)
        self._reads_ids = self.is_causal_lm and data_collator is None
        if self._reads_ids:
            check_tokenized(forget_dataset, "forget_dataset")
        if data_collator is None:
            data_collator = raw_collator(forget_dataset, processing_class)
        return {"model": model, "data_collator": data_collator}

    def _choose_forget_loss(self) -> str:
        name = super()._choose_forget_loss()
        if name == "redirect" and self.is_causal_lm:
            logger.warning(
                "forget_loss='redirect': %s does not know the texts, nor whom they are about; the model is to answer as it would without "
                "the tokens of the forget rows (DELETE). UnlearnSFTTrainer takes texts", type(self).__name__,
            )  # fmt: skip
        return name

    def _prepared(self, dataset, name: str):
        if dataset is not None and self._reads_ids:
            check_tokenized(dataset, f"{name}_dataset")
        return dataset
