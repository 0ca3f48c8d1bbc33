"""The keys of a recipe of `hf-unlearn audit`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...training.checks import SEEDS, check_fields, check_is_not_original
from .checks import check_at_most_one


@dataclass
class AuditJob:
    """Attacks an unlearned classifier, and says how far it is from models that never saw the data.

    Exactly one of `forget_column` (with `forget_values`), `forget_ids` and `forget_dataset` says what was to be forgotten.

    Args:
        model (`str`): the unlearned model: a folder, or an id on the Hub.
        original (`str`, *optional*): the model that unlearning started from: `"digits"`, a folder or an id.
        retrained (`list[str]`, *optional*): models trained without the forget rows, each from a seed of its own: at least 3.
        retrain (`int`, defaults to 0): with `original: digits`, train so many of them on first use: seconds each.
        dataset (`str`): `"digits"`, a folder, or an id: see [`hf_unlearn.examples.datasets.load`].
        dataset_revision (`str`, *optional*): of a dataset on the Hub.
        split (`str`, defaults to `"train"`): split that the original was trained on.
        test_split (`str`, defaults to `"test"`): split that nobody was trained on.
        forget_column, forget_values (`str`, `list[str]`): the rows with one of these values in this column were to be forgotten.
        forget_ids (`list[str]`): the rows with these ids in `id_column`.
        forget_dataset (`str`): these rows: a folder or an id.
        id_column (`str`, defaults to `"id"`): of the ids.
        checks (`list[str]`, *optional*): `standard`, `quick`, or names of checks. Default: standard.
        seed (`int`, defaults to 0): of all that is drawn.
        output_dir (`str`): gets `audit.json`, `audit.html` and `audit.png`.

    Raises:
        ValueError: a key that is missing, or two that exclude each other.
    """

    _argument_group_name = "models and data"
    # What the selection of rows asks of every job.
    retain: ClassVar[bool] = True
    eval_split: ClassVar[None] = None
    heldout_split: ClassVar[None] = None
    model: str | None = None
    original: str | None = None
    retrained: list[str] | None = None
    retrain: int = 0
    dataset: str | None = None
    dataset_revision: str | None = None
    split: str = "train"
    test_split: str = "test"
    forget_column: str | None = None
    forget_values: list[str] | None = None
    forget_ids: list[str] | None = None
    forget_dataset: str | None = None
    id_column: str = "id"
    checks: list[str] | None = None
    seed: int = 0
    output_dir: str | None = None

    def __post_init__(self):
        for name, example in (
            ("model", "the folder or the id of the unlearned model"),
            ("dataset", "'digits', a folder, or an id on the Hub"),
            ("output_dir", "the folder that gets the report"),
        ):
            if not getattr(self, name):
                raise ValueError(f"{name}: missing; set it to {example}")
        if not check_at_most_one(self, ("forget_column", "forget_ids", "forget_dataset")):
            raise ValueError(
                "forget_column: missing; say what was to be forgotten by forget_column, forget_ids or forget_dataset"
            )
        if bool(self.forget_values) != bool(self.forget_column):
            missing, there = (
                ("forget_values", "forget_column") if self.forget_column else ("forget_column", "forget_values")
            )
            raise ValueError(f"{missing}: missing, which {there} needs")
        check_fields(self, {SEEDS: ("seed",), "≥ 0": ("retrain",)})
        if self.retrain and (self.original != "digits" or self.dataset != "digits" or self.forget_column != "label"):
            raise ValueError(
                "retrain: only models of 'digits' are trained, without classes of it (forget_column: label); name yours by retrained"
            )
        if self.original == self.model:
            raise ValueError("original: is the audited model itself; name the model as it was before unlearning")
        check_is_not_original(self.output_dir, self.original)
