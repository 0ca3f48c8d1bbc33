"""What an unlearning trainer writes: a sanitized model with its card, and private state that never leaves `_private/`."""

from __future__ import annotations

import json
import math
import os
import secrets
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data import fingerprint
from ..hub.adapters import save_merged
from ..hub.card import hub_id, loading_code, unlearning_card
from ..hub.provenance import Provenance, library_versions
from ..hub.publish import publish_folder
from .config import UnlearnArguments
from .guard import NOTHING_TO_FORGET


if TYPE_CHECKING:
    from huggingface_hub import ModelCard


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


class SavingMixin:
    """Saving, card and push of an unlearning trainer."""

    @property
    def private_dir(self) -> Path:
        """Reference, Fisher, guard states, keys: everything that could undo the unlearning or tell what was forgotten."""
        return Path(self.args.output_dir, "_private")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        half_trained = Path(output_dir).name.startswith(PREFIX_CHECKPOINT_DIR)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not half_trained and self.args.merge_adapter and hasattr(model, "peft_config"):
            if self.args.should_save:
                save_merged(model, output_dir)
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
                config["base_model_name_or_path"] = hub_id(config.get("base_model_name_or_path"))
                adapter.write_text(json.dumps(config, indent=2, sort_keys=True))
        if not half_trained and self.args.should_save:
            self.model_card(self.hub_model_id or output_dir).save(Path(output_dir, "README.md"))

    # The card

    @cached_property
    def _fingerprint(self) -> str:
        file = self.private_dir / "fingerprint.key"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as handle:
                handle.write(secrets.token_bytes(32))
        rows = self.source_dataset  # as they are stored: a transform may draw at random
        return fingerprint(rows.with_format(None) if isinstance(rows, Dataset) else rows, file.read_bytes())

    def _forgotten(self) -> str:
        if self.args.forget == "class":
            names = getattr(self.model.config, "id2label", {})
            labels = [names.get(c, str(c)) for c in self.forgotten_classes]
            return ("class " if len(labels) == 1 else "classes ") + ", ".join(labels)
        return f"{len(self.source_dataset):,} examples"

    def _chosen(self) -> dict[str, Any]:
        """The settings that a card tells."""
        chosen = {f.name: getattr(self.args, f.name) for f in fields(UnlearnArguments)}
        for name in ("replay_weight", "fisher_weight"):
            chosen[name] = getattr(self, name)
        chosen["forget_loss"] = self.forget_loss_name
        for name in ("heldout_loss", "guard_steps", "id_column", "merge_adapter"):
            chosen.pop(name)
        return chosen | {name: getattr(self.args, name) for name in RUN_SETTINGS if getattr(self.args, name) != -1}

    def provenance(self) -> Provenance:
        """How this model was made: method, settings, versions and a keyed fingerprint of the forget set, never its data."""
        chosen = self._chosen()
        return Provenance(
            method=self._method,
            method_title=self._title,
            paper=self._paper,
            base_model=self.base_model,
            base_revision=getattr(self.model.config, "_commit_hash", None),
            hyperparameters={name: value for name, value in sorted(chosen.items()) if value is not None},
            seed=self.args.seed,
            versions=library_versions(),
            forget_examples=len(self.source_dataset),
            forget_fingerprint=self._fingerprint,
            forgotten=self._forgotten(),
            steps=self.guard.best.step if self.guard and self.guard.best else self.state.global_step,
        )

    def model_card(self, source: str | Path, **kwargs: Any) -> ModelCard:
        """The card of the model as it is now.

        Args:
            source (`str`): repository id, or folder that the model was saved to, of which only the name is written.
            kwargs: as for [`~hf_unlearn.hub.card.unlearning_card`]; `trainer.results` and `trainer.card_values` are the
                defaults.
        """
        name = str(source) if source == self.hub_model_id else Path(source).resolve().name
        values = {
            "model_name": Path(name).name,
            "results": self.results,
            "failed_checks": self.failed_checks,
            "tags": (self._method,),
        }
        return unlearning_card(self.provenance(), **(values | self._card_defaults(name) | self.card_values | kwargs))

    def _card_defaults(self, name: str) -> dict[str, Any]:
        """What the card says of this kind of model."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        tag = "text-generation" if self.is_causal_lm else PIPELINE_TAGS.get(getattr(base, "loss_type", None))
        return {"pipeline_tag": tag, "load_snippet": loading_code(type(base), name, processor=self.processor_loader)}

    @property
    def processor_loader(self) -> str | None:
        """The Auto class that loads what is saved as `processing_class`."""
        if self.processing_class is None:
            return None
        kinds = {
            PreTrainedTokenizerBase: "AutoTokenizer",
            ProcessorMixin: "AutoProcessor",
            FeatureExtractionMixin: "AutoFeatureExtractor",
        }
        return next(
            (name for kind, name in kinds.items() if isinstance(self.processing_class, kind)), "AutoImageProcessor"
        )

    @property
    def failed_checks(self) -> list[str]:
        """What the guard could not vouch for in the state that is kept, a line each, for the card."""
        best = self.guard.best if self.guard else None
        if best is None:
            return []
        failed = []
        if self.guard.looks[0].forgotten:
            failed.append(f"Nothing was there to forget before the first step: {NOTHING_TO_FORGET[self.args.forget]}.")
        if not best.forgotten and math.isfinite(best.remembered):
            unit = "accuracy on the forget set" if self.args.forget == "class" else "nats of loss"
            failed.append(f"The forget target was not reached: {best.remembered:.3g} {unit} are missing.")
        later = self.guard.looks[1:]
        if best.step == 0 and later and not any(look.kept for look in later):
            failed.append("Nothing was unlearned: every state but the original lost more utility than the tolerance.")
        if not best.kept:
            failed.append(
                f"Utility fell by {best.utility_drop:.3g}, more than the tolerance of {self.utility_tolerance:g}."
            )
        return failed

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Write `README.md`. Called by Trainer and TRL; the arguments that they fill a stock card with are dropped."""
        if self.is_world_process_zero():
            self.model_card(self.hub_model_id or self.args.output_dir).save(Path(self.args.output_dir, "README.md"))

    def push_to_hub(
        self,
        commit_message: str = "End of unlearning",
        blocking: bool = True,
        token=None,
        revision=None,
        private=None,
        **kwargs,
    ):
        """Save, and upload the sanitized files by an allow-list: model, config, processor, card.

        Returns:
            The commit, or a future of it if `blocking=False`; None on other processes than the first.
        """
        target = self.hub_model_id or self.args.hub_model_id
        if target is not None and target == hub_id(self.base_model):
            raise ValueError(
                f"hub_model_id: {target!r} is the original's repository, whose history keeps it; choose another"
            )
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        return publish_folder(
            self.args.output_dir,
            self.hub_model_id,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            private=private if private is not None else self.args.hub_private_repo,
            commit_message=commit_message,
            run_as_future=not blocking,
            allow_adapter=not self.args.merge_adapter,
        )
