"""What every unlearning trainer tells about its model: provenance, card, and a push by an allow-list."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from ..data import fingerprint
from ..hub.card import Figure, unlearning_card
from ..hub.loading import hub_id
from ..hub.provenance import Provenance, library_versions
from ..hub.publish import publish_folder


if TYPE_CHECKING:
    from huggingface_hub import ModelCard


class PushingMixin:
    """Card and push of any trainer here, by an allow-list. A trainer says what its card tells by `model_card`."""

    base_model: str | None = None
    _commit_message = "End of training"
    _allow_adapter = False

    @property
    def private_dir(self) -> Path:
        """Reference, Fisher, guard states, keys: everything that could undo the unlearning or tell what was forgotten. Never
        published.
        """
        return Path(self.args.output_dir, "_private")

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Write `README.md`. Called by Trainer and TRL; the arguments that they fill a stock card with are dropped."""
        if self.is_world_process_zero():
            self.model_card(self.hub_model_id or self.args.output_dir).save(Path(self.args.output_dir, "README.md"))

    def push_to_hub(
        self,
        commit_message: str | None = None,
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
            commit_message=commit_message or self._commit_message,
            run_as_future=not blocking,
            allow_adapter=self._allow_adapter,
        )


class PublishingMixin(PushingMixin):
    """Card and push of an unlearning trainer. A kind of trainer says what its card tells by `_chosen`, `_forgotten`,
    `_card_defaults` and `failed_checks`.
    """

    _base_revision: str | None = None
    outcome_figures: Sequence[Figure] = ()
    _commit_message = "End of unlearning"

    @cached_property
    def _fingerprint(self) -> str:
        file = self.private_dir / "fingerprint.key"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as handle:
                handle.write(secrets.token_bytes(32))
        rows = self.source_dataset  # as they are stored: a transform may draw at random
        return fingerprint(rows.with_format(None) if isinstance(rows, Dataset) else rows, file.read_bytes())

    @property
    def _steps_taken(self) -> int:
        return self.state.global_step

    def _drop_pictures(self) -> None:
        """Those of an earlier run into the same folder: they would be published."""
        if self.args.should_save:
            for name in ("before", "after"):
                Path(self.args.output_dir, "pictures", f"{name}.png").unlink(missing_ok=True)

    def provenance(self) -> Provenance:
        """How this model was made: method, settings, versions and a keyed fingerprint of the forget set, never its data."""
        chosen = self._chosen()
        return Provenance(
            method=self._method,
            method_title=self._title,
            paper=self._paper,
            base_model=self.base_model,
            base_revision=self._base_revision,
            hyperparameters={name: value for name, value in sorted(chosen.items()) if value is not None},
            seed=self.args.seed,
            versions=library_versions(),
            forget_examples=len(self.source_dataset),
            forget_fingerprint=self._fingerprint,
            forgotten=self._forgotten(),
            steps=self._steps_taken,
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
            "results": [*self.results, *self.outcome_figures],
            "failed_checks": self.failed_checks,
            "tags": (self._method,),
        }
        return unlearning_card(self.provenance(), **(values | self._card_defaults(name) | self.card_values | kwargs))
