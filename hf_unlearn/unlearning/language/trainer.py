"""`UnlearnSFTTrainer` for `SFTTrainer`: language models that forget texts and instructions."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast
from datasets import Dataset
from trl import SFTTrainer

from ...data import overlap
from ...training.collators import ALTERNATE
from ...training.models import is_causal_lm
from ...training.texts import as_prompt_completion, check_template, check_texts, count_tokens, fit_length
from ..config import UnlearnSFTConfig
from ..objective import takes_pairs
from ..stock import parts_of
from ..trainer import UnlearnMixin
from .alternates import wanted_instead
from .altpo import AltPOMixin
from .redirect import FEWEST, RedirectMixin
from .turns import are_texts, as_turns, taught_in_turns


logger = logging.getLogger(__name__)


def default_rate(model: Any, adapter: bool) -> float:
    """The learning rate where none is given: 10⁻³ for a model as a whole, and 4 · 10⁻³ for a LoRA, up to a width of 320, at which they were
    chosen. Wider models are trained in smaller steps, by a rule of thumb: 10⁻³ · (320 / width)², and 4 · 10⁻³ · 320 / width.

    Args:
        model (`PreTrainedModel`): its config says how wide it is.
        adapter (`bool`): whether only an adapter is trained.
    """
    narrower = min(1.0, 320 / model.config.get_text_config().hidden_size)
    return 4e-3 * narrower if adapter or hasattr(model, "peft_config") else 1e-3 * narrower**2


class UnlearnSFTTrainer(RedirectMixin, AltPOMixin, UnlearnMixin, SFTTrainer):
    """[`~trl.SFTTrainer`] that makes a language model forget instructions: `forget_dataset=` instead of `train_dataset=`.

    Takes the formats that `SFTTrainer` takes (text, prompt and completion, messages), with its completion masks and chat
    templates; columns such as `question` and `answer` are taken for prompt and completion. The same arguments as
    [`UnlearnTrainer`] besides. Packing is refused: it takes away the boundaries between the examples to forget. Forget texts
    longer than `max_length` are split, so that all of them is forgotten.

    Prompts and completions that are texts go without the chat template, as in `SFTTrainer`, but for a model that was evidently taught them
    through it: where that makes the answers of the first rows at least twice as likely, all datasets of texts are taken for turns of a
    conversation, and the logger says so. Rows of `text` always stay as they are.

    Args:
        subject (callable, *optional*): a forget row to the words in its prompt that name whom or what it is about, or None. A column
            `subject` says the same. Without either, and where it says None, `redirect` looks for words that the forget prompts
            use far more often than what is to be kept does.
    """

    _config_class = UnlearnSFTConfig

    def __init__(self, *args, subject: Callable[[dict[str, Any]], str | None] | None = None, **kwargs):
        self._subject_of = subject
        super().__init__(*args, **kwargs)

    def _load(self, model, args, processing_class):
        model, processing_class, name = super()._load(model, args, processing_class)
        if not is_causal_lm(model):
            raise ValueError(
                f"model: {type(model).__name__} is no language model that writes; UnlearnTrainer is for classifiers"
            )
        self._loaded = model, args  # asked how it answers, before TRL has it
        if args.learning_rate is None:
            args.learning_rate = default_rate(model, self._peft_config is not None)
        if args.num_train_epochs is None:
            self._chooses_epochs = True
            args.num_train_epochs = FEWEST
        return model, processing_class, name

    def _stock_arguments(self, model, data_collator, forget_dataset, processing_class, peft_config) -> dict[str, Any]:
        if forget_dataset is None:
            raise ValueError("forget_dataset: missing; pass the examples to forget, or eval_dataset= to evaluate only")
        if not isinstance(forget_dataset, Dataset):
            kind = type(forget_dataset).__name__
            raise ValueError(f"forget_dataset: {kind} is not a datasets.Dataset; make it one (Dataset.from_list)")
        if {"image", "images"} & set(getattr(forget_dataset, "column_names", None) or ()):
            raise ValueError(
                "forget_dataset: holds images; UnlearnSFTTrainer is for text, UnlearnTrainer for classifiers"
            )
        return {"model": model, "data_collator": data_collator, "peft_config": peft_config}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "forget" in inputs:  # what the stock trainer counts and logs
            masks = [part.get("attention_mask", torch.ones_like(part["input_ids"])) for part in parts_of(inputs)]
            self._total_train_tokens += self.accelerator.gather(sum(mask.sum() for mask in masks)).sum().item()
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _readable(self, forget_dataset, args, kwargs):
        if self._subject_of is not None:
            if "subject" in forget_dataset.column_names:
                raise ValueError("subject: forget_dataset has a column 'subject' too; leave one of them out")
            forget_dataset = forget_dataset.add_column("subject", [self._subject_of(row) for row in forget_dataset])
        if kwargs.get("formatting_func") is not None:
            return forget_dataset
        return as_prompt_completion(forget_dataset, args.dataset_text_field, "forget_dataset")

    _in_turns: bool | None = (
        None  # whether questions and answers that are texts are turns; not known before there are some
    )

    def as_asked(self, rows, argument: str = "rows", tokenizer: Any = None):
        """Questions and answers as the trainer reads them: as turns of a conversation where they are texts, and the original was evidently
        taught them so.

        Args:
            rows (`Dataset`): in any format; those of another one are returned as they are.
            argument (`str`): what to call them in what is told.
            tokenizer (*optional*): defaults to `processing_class`.
        """
        tokenizer = self.processing_class if tokenizer is None else tokenizer
        if not (are_texts(rows) and getattr(tokenizer, "chat_template", None)):
            return rows
        if self._in_turns is None:
            self._in_turns = self._asks_in_turns(rows, argument, tokenizer)
        return as_turns(rows, argument) if self._in_turns else rows

    def _asks_in_turns(self, rows, argument: str, tokenizer: Any) -> bool:
        found, (model, args) = False, self._loaded
        if args.process_index == 0:
            found, turns, plain = taught_in_turns(model, tokenizer, rows)
            level, what = (
                (logging.WARNING, "are taken for turns") if found else (logging.INFO, "are read as they stand")
            )
            logger.log(
                level, "%s: questions and answers %s: the original's log-likelihood of an answer is %.3g through the chat template, and %.3g "
                "without it", argument, what, turns, plain,
            )  # fmt: skip
        if args.world_size > 1:  # one that saw it otherwise would train on other tokens
            found = bool(broadcast(torch.tensor(int(found), device=args.device)))
        return found

    def _run_settings(self) -> dict[str, Any]:
        return super()._run_settings() | {"chat_template for texts": self._in_turns or None}

    def _prepared(self, dataset, name: str):
        if dataset is None or self._skip_prepare_dataset:
            return dataset
        rows = self._prepare_dataset(dataset, self.processing_class, self.args, False, self._formatting_func, name)
        if self.forget_dataset is not None and not all(
            self.args.id_column in part.column_names for part in (self.source_dataset, dataset)
        ):  # in whatever columns they came
            tokens = (part.select_columns("input_ids") for part in (self.forget_dataset, rows))
            if shared := overlap(*tokens, ""):
                raise ValueError(f"{name}_dataset: {shared}; remove them from one of the two")
        return rows

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """As TRL's, but that nothing of a forget text is cut off, and that it is said what is cut off of others."""
        argument = {
            "train": "forget_dataset", "retain": "retain_dataset", "heldout": "heldout_dataset", ALTERNATE: "alternate",
        }.get(dataset_name, f"eval_dataset[{dataset_name!r}]")  # fmt: skip
        if formatting_func is None:
            dataset = as_prompt_completion(dataset, args.dataset_text_field, argument)
            check_texts(dataset, args.dataset_text_field, argument)
            dataset = self.as_asked(dataset, argument, processing_class)
            check_template(dataset, processing_class, argument)
        whole, alternates = dataset_name == "train", None
        if whole and takes_pairs(args.forget_loss) and "input_ids" not in dataset.column_names:
            alternates = wanted_instead(dataset, args.forget_loss, args.seed)
        if alternates is not None:
            others = (processing_class, args, packing, formatting_func, ALTERNATE)
            alternates = self._prepare_dataset(alternates, *others).select_columns(["input_ids", "labels"])
            if missing := len(dataset) - len(alternates):
                raise ValueError(
                    f"alternate: {missing} of {len(dataset)} texts have no token that counts; raise max_length={args.max_length}, "
                    "or fill in what is to be answered"
                )
        uncut = copy.copy(args)
        uncut.max_length = None
        dataset = super()._prepare_dataset(dataset, processing_class, uncut, packing, formatting_func, dataset_name)
        if not isinstance(dataset, Dataset):
            return dataset
        if alternates is not None:
            dataset = dataset.remove_columns({ALTERNATE} & {*dataset.column_names}).add_column(
                ALTERNATE, list(alternates)
            )
        return fit_length(dataset, args.max_length, args.truncation_mode, argument, whole=whole)

    def _forgotten(self) -> str:
        return f"{super()._forgotten()} ({count_tokens(self.forget_dataset):,} tokens)"
