"""What an unlearning trainer writes: a sanitized model with its card, and private state that never leaves `_private/`."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data import in_words
from ..hub.adapters import check_mergeable, merged_state_dict, save_merged
from ..hub.loading import loading_code, processor_loader
from ..hub.origin import hub_id
from ..hub.publish import save_settings
from ..parameters.sharding import is_shared, let_go, stock_class, whole
from ..training.publishing import PublishingMixin
from .config import UnlearnArguments
from .objective import FORGET_LOSSES


if TYPE_CHECKING:
    from peft import PeftModel


RUN_SETTINGS = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)

PIPELINE_TAGS = {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
}


class SavingMixin(PublishingMixin):
    """Saving, card and push of an unlearning trainer of one model."""

    _merged: dict[str, Any] | None = None  # of a model that processes share

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        half_trained = Path(output_dir or self.args.output_dir).name.startswith(PREFIX_CHECKPOINT_DIR)
        merges = (
            not half_trained and self.args.merge_adapter and hasattr(model, "get_base_model")
        )  # of diffusers none has
        if merges and is_shared(model):  # here all processes are together
            self._merged = _merged_whole(model, keep=self.args.should_save)
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._merged = None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        half_trained = Path(output_dir).name.startswith(PREFIX_CHECKPOINT_DIR)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not half_trained and self.args.merge_adapter and hasattr(model, "peft_config"):
            if self.args.should_save:
                save_merged(model, output_dir, self._merged)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(output_dir)
        else:
            super()._save(output_dir, state_dict)
            Path(output_dir, "training_args.bin").unlink(missing_ok=True)  # a pickle, which nothing here needs
            adapter = Path(output_dir, "adapter_config.json")
            if (
                not half_trained and self.args.should_save and adapter.is_file()
            ):  # PEFT writes the path of a local base
                config = json.loads(adapter.read_text())
                config["base_model_name_or_path"] = hub_id(self.base_model or config.get("base_model_name_or_path"))
                adapter.write_text(json.dumps(config, indent=2, sort_keys=True))
        if not half_trained and self.args.should_save:
            self._write_card(Path(output_dir))

    def _save_settings(self, folder: Path) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if hasattr(model, "peft_config"):
            if self.args.merge_adapter:
                check_mergeable(model)
            for config in model.peft_config.values():
                config.save_pretrained(folder)
            model = model.get_base_model()
        save_settings(model, folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    # The card

    @property
    def _steps_taken(self) -> int:
        if self.args.load_best_model_at_end and self.state.best_global_step is not None:
            return self.state.best_global_step
        return self.guard.best.step if self.guard and self.guard.best else self.state.global_step

    @property
    def _base_revision(self) -> str | None:
        return getattr(self.model.config, "_commit_hash", None) or super()._base_revision

    @property
    def _stands_on(self) -> dict[str, str]:
        return self.forgetting.credit

    @property
    def _allow_adapter(self) -> bool:
        return not self.args.merge_adapter

    def _forgotten(self) -> str:
        if self.args.forget == "class":
            names = getattr(self.model.config, "id2label", {})
            return in_words([names.get(c, c) for c in self.forgotten_classes])
        return f"{len(self.source_dataset):,} examples"

    def _chosen(self) -> dict[str, Any]:
        """The settings that a card tells."""
        chosen = {f.name: getattr(self.args, f.name) for f in fields(UnlearnArguments)}
        chosen["forget_loss"] = self.forget_loss_name
        for name in ("replay_weight", "fisher_weight"):
            chosen[name] = getattr(self, name)
        of_texts = () if self.is_causal_lm else ("loss_reduction",)
        of_some = {name for every in FORGET_LOSSES.values() for name in every.settings}
        unused = {
            "retain_per_forget": self.retain_dataset is None,
            "bn": self.is_causal_lm,
            "forget_accuracy": self.args.forget != "class",
        } | dict.fromkeys(("fisher", "fisher_examples", "fisher_samples"), not self.fisher_weight)
        idle = [name for name, is_idle in unused.items() if is_idle]
        for name in ("heldout_loss", "guard_steps", "id_column", "merge_adapter", *of_texts, *of_some, *idle):
            chosen.pop(name)
        return (
            chosen
            | self._quantisation
            | self.forgetting.chosen()
            | {name: getattr(self.args, name) for name in RUN_SETTINGS if getattr(self.args, name) != -1}
        )

    @property
    def _quantisation(self) -> dict[str, Any]:
        """Of a base whose weights are in 4 or 8 bits: how, and what is saved."""
        config = getattr(getattr(self.model, "config", None), "quantization_config", None)
        if config is None:
            return {}
        how = (
            f"{config.bnb_4bit_quant_type}, 4 bits"
            if getattr(config, "load_in_4bit", False)
            else str(config.quant_method)
        )
        saved = (
            "saved is what these stand for, with the adapter"
            if self.args.merge_adapter
            else "the adapter is for these"
        )
        return {"base weights": f"{how}; {saved}"}

    def _card_defaults(self, name: str) -> dict[str, Any]:
        """What the card says of this kind of model."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        tag = "text-generation" if self.is_causal_lm else PIPELINE_TAGS.get(getattr(base, "loss_type", None))
        relation = "adapter" if hasattr(model, "peft_config") and not self.args.merge_adapter else "finetune"
        return {"pipeline_tag": tag, "base_model_relation": relation, "load_snippet": self.loading_code(name)}

    def loading_code(self, name: str) -> str:
        """Python that loads what is saved: the base with the adapter merged into it, where there is one."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return loading_code(stock_class(base), name, processor=self.processor_loader)

    @property
    def processor_loader(self) -> str | None:
        """The Auto class that loads what is saved as `processing_class`."""
        return processor_loader(self.processing_class)


@torch.no_grad()
def _merged_whole(model: PeftModel, keep: bool) -> dict[str, Tensor]:
    """The state dict of a model with its adapter folded in, which processes share and ask for together: on the CPU of those that are to `keep` it."""
    let_go(model)
    found: dict[str, Tensor] = {}
    gathered: dict[int, Tensor | None] = {}  # tied ones stay one tensor
    for name, value in merged_state_dict(model)[1].items():
        if id(value) not in gathered:
            everything = whole(value)
            gathered[id(value)] = everything.cpu() if keep else None
        if keep:
            found[name] = gathered[id(value)]
    return found
