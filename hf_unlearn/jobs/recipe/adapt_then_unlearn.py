"""The keys of a recipe of `hf-unlearn unlearn --method adapt_then_unlearn`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ...examples.named import GANS
from ...training.checks import check_fields, check_is_not_original
from .checks import check_needs, check_numbers, check_small


@dataclass
class GANJob:
    """Which GAN forgets what: the keys of a recipe with `method: adapt_then_unlearn` besides those of
    [`AdaptThenUnlearnConfig`].

    What is forgotten is said by marks on samples: by a classifier that plays the user (`marker` with `classes`), by
    two sets of images (`undesired_folder` and `clean_folder`), or by numbers on a sheet of samples (`undesired`). With none of the three
    the job writes that sheet and ends.

    Args:
        method (`"adapt_then_unlearn"`): the trainer.
        preset (`"paper"`, *optional*): the paper's objective alone; keys that are given win.
        model (`str`): `"digits-gan"` or `"fashion-mnist-gan"` (small GANs, trained on first use: minutes), the folder or the
            id of a [`GANPipeline`].
        marker (`str`, *optional*): `"digits"`, a folder or an id of an image classifier, which marks the samples that it sees
            one of `classes` in. Not the classifier that counts, or the figures flatter.
        classes (`list[str]`, *optional*): names or numbers of classes, for `marker` and for `classifier`.
        marks (`int`, *optional*, defaults to 100): undesired marks: samples are looked at one after another until there are so
            many, and all others looked at are clean. `None`: all `mark_samples` samples are looked at.
        undesired_folder, clean_folder (`str`, *optional*): folders of datasets written by `save_to_disk`, with a column of images: with
            what is to be forgotten, and without.
        undesired (`list[int]`, *optional*): numbers on the sheet of the samples that show it; all others there are clean.
        looked_at (`int`, defaults to 200): samples on the sheet. Which ones they are is decided by model and seed.
        classifier (`str`, *optional*): counts what is drawn before and after: `"digits"`, a folder or an id.
        measure_samples (`int`, defaults to 500): images drawn before and after for it.
        dataset, eval_split (`str`, *optional*): real images, and the split of them: those of the other classes are the
            reference of the Fréchet distance and of coverage. Their labels are the classifier's numbers.
        dataset_revision (`str`, *optional*): of a dataset on the Hub.

    Raises:
        ValueError: a key that is missing, or two that exclude each other.
    """

    _argument_group_name = "model, feedback and measuring"

    method: str | None = None
    preset: Literal["paper"] | None = None
    model: str | None = None
    marker: str | None = None
    classes: list[str] | None = None
    marks: int | None = 100
    undesired_folder: str | None = None
    clean_folder: str | None = None
    undesired: list[int] | None = None
    looked_at: int = 200
    classifier: str | None = None
    measure_samples: int = 500
    dataset: str | None = None
    dataset_revision: str | None = None
    eval_split: str | None = None

    def __post_init__(self):
        if not self.model:
            raise ValueError(f"model: missing; set it to {', '.join(map(repr, GANS))}, a folder, or an id on the Hub")
        check_small(self, "model", GANS)
        check_fields(self, {"≥ 1": ("marks",), "≥ 2": ("measure_samples",)})
        self._check_feedback()
        self._check_measuring()

    def _check_feedback(self) -> None:
        given = [
            name
            for name in ("marker", "undesired_folder", "clean_folder", "undesired")
            if getattr(self, name) is not None
        ]
        for name, other in (("undesired_folder", "clean_folder"), ("clean_folder", "undesired_folder")):
            if given == [name]:
                raise ValueError(f"{other}: missing, which {name} needs; set it to a folder written by save_to_disk")
        if len(given) > 1 and given != ["undesired_folder", "clean_folder"]:
            raise ValueError(f"{given[-1]}: given beside {given[0]}; keep one of them")
        if self.marker is not None and not self.classes:
            raise ValueError("classes: missing; list the classes that marker is to mark, as in [3]")
        check_numbers(self.undesired, self.looked_at, others="clean")

    def _check_measuring(self) -> None:
        if self.classes and not (self.marker or self.classifier):
            raise ValueError(
                "classifier: missing, which classes needs; set it, or marker, to 'digits', a folder, or an id"
            )
        check_needs(
            self,
            ("dataset_revision", "dataset", "an id on the Hub"),
            ("eval_split", "dataset", "'digits', a folder, or an id"),
            ("dataset", "eval_split", "the split to compare with, as in test"),
            ("eval_split", "classifier", "'digits', a folder, or an id"),
            ("eval_split", "classes", "the classes that are not to be compared with, as in [3]"),
        )

    def check_config(self, given: dict[str, Any]) -> None:
        """As for [`UnlearnJob`][hf_unlearn.jobs.recipe.unlearn]."""
        if not given.get("output_dir"):
            raise ValueError("output_dir: missing; set it to the folder that gets the unlearned model")
        check_is_not_original(given["output_dir"], self.model)
