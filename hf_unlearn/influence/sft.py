"""`FINETrainer`: a `SFTTrainer` that tells what its examples did."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers.utils import logging
from trl import SFTTrainer

from ..training.collators import ROW
from ..training.losses import IGNORED, next_tokens
from ..training.texts import as_prompt_completion, check_template, check_texts
from .config import FINEConfig
from .trainer import FINEMixin


logger = logging.get_logger(__name__)


class FINETrainer(FINEMixin, SFTTrainer):
    """[`~trl.SFTTrainer`] that tells which training examples taught the model a behaviour.

    Takes the formats that `SFTTrainer` takes, and `question` and `answer` as [`UnlearnSFTTrainer`] does, for `train_dataset` and
    `target_dataset`; the same arguments as
    [`InfluenceTrainer`] besides. Packing is refused: it takes away the boundaries between examples.

    With `in_run` and a trainable head (full fine-tuning, `modules_to_save=["lm_head"]`) the head runs as a layer, as TRL's fused loss
    would hide its gradient. The updates are then those of `SFTTrainer` up to rounding: weights differ by 10⁻⁵ in float32 after a few
    steps and by 10⁻³ in bfloat16, and the logits take memory. Adapters train as they would without.
    """

    _config_class = FINEConfig

    def _stock_arguments(self, model, data_collator, train_dataset, processing_class, peft_config, sample_ids):
        if not isinstance(train_dataset, Dataset):
            raise ValueError(f"train_dataset: {type(train_dataset).__name__} is not a datasets.Dataset; make it one")
        if ROW in train_dataset.column_names:
            raise ValueError(f"train_dataset: column {ROW!r} is the trainer's own; rename yours")
        # Preparing filters and shuffles rows: their ids go along under a name that no template uses.
        with_row = train_dataset.add_column(ROW, list(range(len(train_dataset))))
        return {"model": model, "data_collator": data_collator, "train_dataset": with_row, "peft_config": peft_config}

    def _readable(self, train_dataset, args, kwargs):
        if kwargs.get("formatting_func") is not None:
            return train_dataset
        return as_prompt_completion(train_dataset, args.dataset_text_field, "train_dataset")

    def _prepared(self, dataset, name: str):
        prepared = self._prepare_dataset(dataset, self.processing_class, self.args, False, self._formatting_func, name)
        if len(prepared) == 0:
            raise ValueError(f"max_length={self.args.max_length}: leaves no example of target {name!r}; raise it")
        return prepared

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        argument = {"train": "train_dataset"}.get(dataset_name, f"target_dataset: {dataset_name!r}")
        if formatting_func is None:
            dataset = as_prompt_completion(dataset, args.dataset_text_field, argument)
            check_texts(dataset, args.dataset_text_field, argument)
            check_template(dataset, processing_class, argument)
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if args.max_length is not None and isinstance(prepared, Dataset) and "input_ids" in prepared.column_names:
            lengths = [
                len(ids) for batch in prepared.select_columns("input_ids").iter(1000) for ids in batch["input_ids"]
            ]
            full, lost = sum(length >= args.max_length for length in lengths), len(dataset) - len(prepared)
            if full or lost:
                logger.warning(
                    "%s: %d of %d texts fill max_length=%d, what they have beyond it is cut off, and %d have nothing left that counts; "
                    "raise it to see them whole", argument, full, len(dataset), args.max_length, lost,
                )  # fmt: skip
        return prepared

    def _prepared_ids(self, sample_ids: list) -> list:
        return [sample_ids[row] for row in self.train_dataset[ROW]]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._needs_head and self.model.training and torch.is_grad_enabled():
            model = _Unfused(model)
        return super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    @property
    def _needs_head(self) -> bool:
        """Whether the head's own gradient is to be seen: TRL's fused loss goes around the layer."""
        head = self.accelerator.unwrap_model(self.model).get_output_embeddings()
        return self._ghost is not None and head is not None and head.weight.requires_grad


class _Unfused:
    """A causal language model whose head runs as a layer, and what TRL's loss wants to know of its logits."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *, labels: Tensor, fused_lm_head: bool = True, **inputs: Tensor) -> SimpleNamespace:
        outputs = self.model(**inputs)
        logits, targets = next_tokens(outputs.logits, labels)
        mask = targets != IGNORED
        log_p = logits.float().log_softmax(-1)
        own = log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(~mask, 0)
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(-1).masked_fill(~mask, 0)
            is_top1 = (log_p.argmax(-1) == targets) & mask
        return SimpleNamespace(
            log_probs=own,
            label_mask=mask,
            entropy=entropy,
            is_top1=is_top1,
            aux_loss=getattr(outputs, "aux_loss", None),
        )
