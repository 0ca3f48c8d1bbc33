"""The keys of a recipe of `hf-unlearn unlearn --method vdu`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...examples.named import DDPMS, TEXT_TO_IMAGE
from ...training.checks import check_fields
from .checks import check_needs
from .unlearn import UnlearnJob


@dataclass
class VDUJob(UnlearnJob):
    """Which diffusion model forgets what: the keys of a recipe with `method: vdu` besides those of [`VDUConfig`], and with `esd`,
    `concept_ablation` or `salun` besides those of their configs.

    What is forgotten is said as for classifiers, by `forget_column`, `forget_ids` or `forget_dataset`, or by the config's
    `concept` or `forget_prompts`, which need no dataset.

    Args:
        model (`str`): `"digits-ddpm"`, `"fashion-mnist-ddpm"` or `"coloured-digits"` (small models, trained on first use: minutes, the
            last one, which is prompted, about 40), the folder or the id of a pipeline.
        classifier (`str`, *optional*): counts what is drawn before and after: `"digits"`, a folder or an id of an image
            classifier. Its classes are those of the dataset.
        forget_limit (`int`, *optional*): use at most so many of the forget rows, drawn by the seed.
        measure_samples (`int`, defaults to 500): images drawn before and after for it.
        eval_split (`str`, *optional*): split whose rows that are not forgotten are the reference of the Fréchet distance.
    """

    method: str | None = None
    classifier: str | None = None
    forget_limit: int | None = None
    measure_samples: int = 500

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, {"≥ 2": ("measure_samples",), "≥ 1": ("forget_limit",)})
        example = "'digits', a folder, or an id"
        check_needs(self, ("retain", "dataset", example), ("eval_split", "dataset", example))

    @property
    def _small(self) -> tuple[str, ...]:
        return (*DDPMS, *TEXT_TO_IMAGE)

    def _needs_forget_rows(self) -> bool:
        return False  # a concept or forget_prompts may stand in: the config knows

    @property
    def names_rows(self) -> bool:
        """Whether it says which rows are forgotten."""
        return any((self.forget_column, self.forget_ids, self.forget_dataset))

    def check_config(self, given: dict[str, Any]) -> None:
        super().check_config(given)
        rows = self.names_rows
        if rows and given.get("forget_prompts"):
            raise ValueError("forget_prompts: given beside rows to forget; keep one of them")
        if not rows and not given.get("forget_prompts") and not given.get("concept"):
            raise ValueError(
                "forget_column: missing; say what to forget by concept, forget_prompts, forget_column, forget_ids or forget_dataset"
            )
