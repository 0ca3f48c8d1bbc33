"""The keys of a recipe of `hf-unlearn unlearn`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ...examples.named import LANGUAGE
from ...training.checks import check_fields, check_is_not_original
from .checks import check_at_most_one, check_small


PRESETS = ("pbu", "vdu", "adapt_then_unlearn")  # the methods whose config has `paper`


@dataclass
class UnlearnJob:
    """Which model forgets what: the keys of an unlearning recipe besides those of the method's config.

    Exactly one of `forget_column` (with `forget_values`), `forget_ids` and `forget_dataset` says what is forgotten.

    Args:
        method (`"pbu"` | `"unlearn"` | `"sft"`): trainer, and so the config that has the other keys.
        preset (`"paper"`, *optional*): with `method: pbu`, `vdu` or `adapt_then_unlearn`: the paper's settings; keys that are given win.
        model (`str`): `"digits"` (a small classifier of scikit-learn's digits), `"facts"` or `"opinions"` (small language models; all
            are trained on first use), a folder, or an id.
        dataset (`str`, *optional*): `"digits"`, `"facts"`, `"opinions"`, a folder, or an id: see [`hf_unlearn.examples.datasets.load`].
        dataset_revision (`str`, *optional*): of a dataset on the Hub.
        split (`str`, defaults to `"train"`): split that holds the forget examples.
        forget_column, forget_values (`str`, `list[str]`): forget the rows with one of these values in this column; class
            names and numbers are both understood.
        forget_ids (`list[str]`): forget the rows with these ids in `id_column`.
        forget_dataset (`str`): forget these rows: a folder or an id, also with config and split as in
            `locuslab/TOFU:forget10:train`; `dataset` is optional then.
        retain (`bool`, defaults to `False`): hand over the other rows of the split too, as data to keep.
        heldout_split (`str`, *optional*): split that the model has never seen: the target of `forget: examples`.
        eval_split (`str`, *optional*): split to measure before and after, for the table and the card. Training never
            sees it.

    Raises:
        ValueError: a key that is missing, or two that exclude each other.
    """

    _argument_group_name = "model and data"
    method: str | None = None
    preset: Literal["paper"] | None = None
    model: str | None = None
    dataset: str | None = None
    dataset_revision: str | None = None
    split: str = "train"
    forget_column: str | None = None
    forget_values: list[str] | None = None
    forget_ids: list[str] | None = None
    forget_dataset: str | None = None
    retain: bool = False
    heldout_split: str | None = None
    eval_split: str | None = None

    def __post_init__(self):
        if self.preset is not None and self.method not in PRESETS:
            raise ValueError(
                f"preset: method {self.method!r} has none, only {', '.join(PRESETS[:-1])} and {PRESETS[-1]} do; leave it out"
            )
        if not self.model:
            raise ValueError("model: missing; set it to 'digits', a folder, or an id on the Hub")
        check_small(self, "model", self._small)
        if self.forget_values and not self.forget_column:
            raise ValueError("forget_column: missing; name the column that holds forget_values, as in 'label'")
        if self.forget_column and not self.forget_values:
            raise ValueError("forget_values: missing; list the values of forget_column to forget, as in [3]")
        check_fields(self, {})
        chosen = check_at_most_one(self, ("forget_column", "forget_ids", "forget_dataset"))
        if not chosen:
            if not self._needs_forget_rows():
                return
            raise ValueError(
                "forget_column: missing; say what to forget by forget_column, forget_ids or forget_dataset"
            )
        if not self.dataset:
            needs = [name for name in ("retain", "heldout_split", "eval_split") if getattr(self, name)]
            if chosen != ["forget_dataset"] or needs:
                why = f", which {needs[0]} needs" if needs else ""
                raise ValueError(f"dataset: missing{why}; set it to 'digits', a folder, or an id on the Hub")

    @property
    def _small(self) -> tuple[str, ...]:
        """Names of small models that it takes."""
        return ("digits", *LANGUAGE)

    def _needs_forget_rows(self) -> bool:
        return True

    def check_config(self, given: dict[str, Any]) -> None:
        """Refuse keys of the method's config that are missing or do not fit.

        Args:
            given (`dict[str, Any]`): those that are there.

        Raises:
            ValueError: naming the key.
        """
        if not given.get("output_dir"):
            raise ValueError("output_dir: missing; set it to the folder that gets the unlearned model")
        if self.forget_ids and "forget" not in given:
            raise ValueError(
                "forget: missing; say 'examples' to forget these rows, or 'class' to forget their classes"
            )
        check_is_not_original(given["output_dir"], self.model)
