"""What every unlearning trainer tells about its model: provenance, card, and a push by an allow-list."""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from yaml import YAMLError

from ..data import example_digest, example_digests, fingerprint
from ..files import first_line, kept_private
from ..hub.allowed import ADAPTER, ADAPTER_CONFIG, CARD, CONFIG, DIFFUSERS, TRANSFORMERS, publishable_files
from ..hub.audited import Audited, with_audit
from ..hub.card import Figure, unlearning_card
from ..hub.objects import Written, check_options, publish
from ..hub.origin import check_is_not_original_repository, inherited, origin, origins_of, revision_of, said_of
from ..hub.provenance import Provenance, library_versions
from ..hub.record import earlier_of, other_record, record_of, write_record
from ..hub.verify import KEY, KEY_CHECK


if TYPE_CHECKING:
    from huggingface_hub import ModelCard


logger = logging.getLogger(__name__)

AFTER = "pictures/after.png"
OPTIONS = ("model_name", "license", "language", "tags", "datasets")  # of a card, that a push takes
# Of what `evaluate` gives: no figures of the model.
_UNTOLD = ("runtime", "per_second", "_time", "num_tokens", "epoch")


class PushingMixin:
    """Card and push of any trainer here, by an allow-list. A trainer says what its card tells by `model_card`."""

    _commit_message = "End of training"
    _allow_adapter = False
    _audit: Audited | None = None
    _base_model: str | None = None

    @property
    def base_model(self) -> str | None:
        """Where the original came from: an id on the Hub, or the absolute path that its folder had when it was loaded."""
        return self._base_model

    @base_model.setter
    def base_model(self, name: str | Path | None) -> None:
        self._base_model = origin(name)

    @property
    def _originals(self) -> list[str | None]:
        return [self.base_model, *origins_of(getattr(self, "pipeline", None))]

    def create_model_card(self, model_name: str | None = None, **card: Any) -> None:
        """Write `README.md`. Called by Trainer and TRL too.

        Args:
            model_name (`str`, *optional*): title. Default: name of the repository or the folder.
            card: as for `model_card`.
        """
        if self.is_world_process_zero():
            given = card if model_name is None else {"model_name": model_name, **card}
            self._write_card(Path(self.args.output_dir), **given)

    def _write_card(self, folder: Path, **card: Any) -> None:
        """The card of what lies in a folder, and its provenance."""
        self.model_card(self.hub_model_id or folder, **card).save(folder / CARD)
        write_record(self._record(), folder, publishable_files(folder))

    def _record(self) -> dict[str, Any]:
        """What `provenance.json` says, besides its files."""
        return other_record(
            "model",
            base_model=self.base_model,
            base_revision=self._base_revision,
            earlier=self._earlier,
            seed=self.args.seed,
        )

    def check_saving(self) -> None:
        """Try what saving and pushing need, on the model as it is and without its weights, so that it does not fail after training.

        Raises:
            ValueError: naming what cannot be saved.
        """
        output_dir = str(self.args.output_dir)
        if not self.args.should_save:
            return
        if self.args.push_to_hub:
            check_is_not_original_repository(self.hub_model_id or self.args.hub_model_id or "", self._originals)
        try:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=output_dir, prefix="_") as scratch:
                self._save_settings(Path(scratch))
                self.model_card(self.hub_model_id or output_dir).save(Path(scratch, "README.md"))
                taken = _taken(Path(scratch), Path(output_dir))
                free = shutil.disk_usage(scratch).free
        except OSError as error:
            raise ValueError(
                f"output_dir: cannot write to {output_dir!r} ({error.strerror or first_line(error)}); choose another folder"
            ) from error
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, YAMLError) as error:
            raise ValueError(
                f"model: could not be saved once it is trained ({' '.join(str(error).split()).rstrip('.')}); mend that before training"
            ) from error
        if taken is not None:
            kind, other = ("folder", "file") if taken.is_dir() else ("file", "folder")
            raise ValueError(
                f"output_dir: {str(taken)!r} is a {kind}, where a {other} of the model must be; move it, or choose another folder"
            )
        needed = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        if free < needed:
            raise ValueError(
                f"output_dir: {free / 2**30:.1f} GiB are free in {output_dir!r}, where the weights alone need "
                f"{needed / 2**30:.1f}; choose another folder"
            )

    def _save_settings(self, folder: Path) -> None:
        """Write all that `_save` does, except weights."""
        raise NotImplementedError

    def init_hf_repo(self, token: str | bool | None = None, private: bool | None = None) -> None:
        """As Trainer's, which makes the repository where `args.push_to_hub` is set; private unless `args.hub_private_repo` says else."""
        super().init_hf_repo(token, self._private(private))

    def _private(self, private: bool | None = None) -> bool:
        return next((said for said in (private, self.args.hub_private_repo) if said is not None), True)

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | bool | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **options: Any,
    ):
        """Save, and publish: [`~hf_unlearn.publish`] with the repository of `args`, or named as the folder.

        Args:
            commit_message, token, revision, private: see there. Default: those of `args`; and private.
            blocking (`bool`, defaults to `True`): wait until it is uploaded.
            options: see there; of the card `model_name`, `license`, `language`, `tags`, `datasets`.

        Returns:
            The commit, or a future of it if `blocking=False`; None on other processes than the first, and of a dry run.

        Raises:
            ValueError: the repository is the original's, or see [`~hf_unlearn.publish`].
        """
        published = publish(
            self,
            self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).resolve().name,
            commit_message=commit_message,
            token=token if token is not None else self.args.hub_token,
            revision=revision or self.args.hub_revision,
            private=self._private(private),
            run_as_future=not blocking,
            **{"show": logger.info} | options,
        )
        return None if published is None else published.commit

    @contextmanager
    def _written(
        self, repo_id: str, audit: Audited | None, *, token: str | bool | None, **options: Any
    ) -> Iterator[Written | None]:
        check_options(self, options, OPTIONS)
        card = {name: value for name, value in options.items() if value is not None}
        first = self.is_world_process_zero()
        if first:
            check_is_not_original_repository(repo_id, self._originals)
        self.hub_model_id, self._audit = repo_id, audit  # of these weights alone
        try:
            self.save_model(_internal_call=True)
            if first and card:
                self.create_model_card(**card)
            folder = Path(self.args.output_dir)
            yield Written(folder, self._originals, self._commit_message, self._allow_adapter) if first else None
        finally:
            self._audit = None

    def _check_audit(self, audit: Audited) -> None:
        raise ValueError("audit: is of an unlearned model, and this trainer unlearns nothing; leave it out")

    @property
    def _base_revision(self) -> str | None:
        return revision_of(self.base_model)

    @property
    def _of_base(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What the base model's card says, and its provenance with all that came before."""
        base, found = getattr(self, "_asked_of_base", (None, ({}, [])))
        if base is not self.base_model:  # asked once: the Hub may be far
            base, asked = self.base_model, (self.base_model, self._base_revision, self.args.hub_token)
            found = said_of(*asked), earlier_of(*asked)
            self._asked_of_base = base, found
        return found

    @property
    def _earlier(self) -> list[dict[str, Any]]:
        return self._of_base[1]

    def _inherited(self, given: dict[str, Any]) -> dict[str, Any]:
        """Metadata: what is given, and what the base model's card says."""
        return inherited(self._of_base[0], given)


def _taken(tried: Path, folder: Path) -> Path | None:
    """What lies in `folder` where one of the files and folders that were `tried`, or of the weights beside them, must be."""
    for path in sorted(tried.rglob("*")):
        weights = (TRANSFORMERS.single, DIFFUSERS.single, ADAPTER) if path.name in (CONFIG, ADAPTER_CONFIG) else ()
        for name in (path.name, *weights):
            there = folder / path.relative_to(tried).with_name(name)
            if there.exists() and there.is_dir() != path.is_dir():
                return there
    return None


class PublishingMixin(PushingMixin):
    """Card and push of an unlearning trainer. A kind of trainer says what its card tells by `_chosen`, `_forgotten`,
    `_card_defaults`, `failed_checks` and `passed_checks`.
    """

    outcome_figures: Sequence[Figure] = ()
    _commit_message = "End of unlearning"
    passed_checks: Sequence[str] = ()

    @cached_property
    def _key(self) -> bytes:
        """Of the fingerprint and the digests: the owner's alone, one a folder."""
        file = self.private_dir / KEY
        if not file.exists():
            with (
                kept_private(file),
                os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as handle,
            ):
                handle.write(secrets.token_bytes(32))
        return file.read_bytes()

    @property
    def _source_rows(self) -> Any:
        rows = self.source_dataset  # as they are stored: a transform may draw at random
        return rows.with_format(None) if isinstance(rows, Dataset) else rows

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._source_rows, self._key)

    @cached_property
    def _forget_set(self) -> dict[str, Any]:
        """Keyed digests of each example, with a salt of this run."""
        salt = secrets.token_bytes(16)
        return {
            "salt": salt.hex(),
            "key_check": example_digest(KEY_CHECK, self._key, salt),
            "digests": example_digests(self._source_rows, self._key, salt),
        }

    def _record(self) -> dict[str, Any]:
        return record_of(self.provenance(), self._earlier, self._forget_set)

    @property
    def _stands_on(self) -> dict[str, str]:
        """Other work that the method is made of, besides its own paper, and the arXiv ids."""
        return {}

    @property
    def _steps_taken(self) -> int:
        return self.state.global_step

    def _drop_pictures(self) -> None:
        """Those of an earlier run into the same folder: they would be published."""
        if self.args.should_save:
            for name in ("before", "after"):
                Path(self.args.output_dir, "pictures", f"{name}.png").unlink(missing_ok=True)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As [`~transformers.Trainer.evaluate`]. What it gives before and after training stands in the card, unless
        `trainer.results` say something else.
        """
        metrics = super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)
        # Of a dict it is asked for each part, and then for all of them.
        several = isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict)
        if not self.is_in_train and not several:
            split = metric_key_prefix.removeprefix("eval").strip("_") or "evaluation"
            found = {(split, key.removeprefix(f"{metric_key_prefix}_")): value for key, value in metrics.items()}
            moment = "before" if self.state.global_step == 0 else self.state  # each run has a state of its own
            self._evaluations = [*getattr(self, "_evaluations", []), (moment, found)]
        return metrics

    @property
    def _evaluated(self) -> list[Figure]:
        """What `evaluate` gave of the model as it is now."""
        before, after = {}, {}
        for moment, found in getattr(self, "_evaluations", []):
            if moment == "before":
                before |= found
            elif moment is self.state:
                after |= found
        figures = []
        for (split, metric), value in after.items():
            values = [value, before.get((split, metric))]
            if (
                any(word in metric for word in _UNTOLD)
                or not isinstance(value, int | float)
                or not math.isfinite(value)
            ):
                continue
            if metric == "accuracy":
                values = [None if value is None else 100 * value for value in values]
            after_value, before_value = values
            if before_value is not None and not math.isfinite(before_value):
                before_value = None
            name, unit = metric.replace("_", " ").capitalize(), "%" if metric == "accuracy" else ""
            figures.append(
                Figure(metric=metric, name=name, before=before_value, after=after_value, split=split, unit=unit)
            )
        return sorted(figures, key=lambda figure: figure.metric == "loss")

    def provenance(self) -> Provenance:
        """How this model was made: method, settings, versions and a keyed fingerprint of the forget set, never its data. What was
        forgotten is said as `trainer.card_values["forgotten"]` says it, if it does.
        """
        chosen = self._chosen()
        return Provenance(
            method=self._method,
            method_title=self._title,
            paper=self._paper,
            stands_on=self._stands_on,
            base_model=self.base_model,
            base_revision=self._base_revision,
            hyperparameters={name: value for name, value in sorted(chosen.items()) if value is not None},
            seed=self.args.seed,
            versions=library_versions(),
            forget_examples=len(self.source_dataset),
            forget_fingerprint=self._fingerprint,
            forgotten=self.card_values.get("forgotten") or self._forgotten(),
            steps=self._steps_taken,
        )

    def _check_audit(self, audit: Audited) -> None:
        audit.check_is_of(getattr(self, "pipeline", None) or self.model)

    def model_card(self, source: str | Path, **kwargs: Any) -> ModelCard:
        """The card of the model as it is now.

        Args:
            source (`str`): repository id, or folder that the model was saved to, of which only the name is written.
            kwargs: as for [`~hf_unlearn.hub.card.unlearning_card`]; `trainer.results` and `trainer.card_values` are the
                defaults, and of license, language and datasets the base model's.
        """
        name = str(source) if source == self.hub_model_id else Path(source).resolve().name
        values = {
            "model_name": Path(name).name,
            "results": [*(self.results or self._evaluated), *self.outcome_figures],
            "failed_checks": self.failed_checks,
            "passed_checks": self.passed_checks,
        }
        if Path(self.args.output_dir, AFTER).is_file():
            values["picture"] = AFTER
        given = {name: value for name, value in (self.card_values | kwargs).items() if name != "forgotten"}
        tags = given.pop("tags", ())
        given["tags"] = (self._method, *((tags,) if isinstance(tags, str) else tags))
        card = unlearning_card(self.provenance(), **(values | self._card_defaults(name) | self._inherited(given)))
        return card if self._audit is None else with_audit(card, self._audit)
