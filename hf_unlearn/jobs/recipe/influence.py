"""The keys of a recipe of `hf-unlearn influence`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...training.checks import check_fields, check_is_not_original
from .checks import check_adapter, check_target


BELONG = {"digits": "classifier", "opinions": "sft"}  # what is built in, and the method it is for


@dataclass
class InfluenceJob:
    """Which examples taught a model what: the keys of an influence recipe besides those of the trainer's config.

    Args:
        method (`str`): `"classifier"` (an `InfluenceTrainer`) or `"sft"` (instruction data, a `FINETrainer`).
        model (`str`): `"digits"` (a small ResNet, untrained), `"opinions"` (a small Llama, untrained, with a tokenizer that is
            trained on the data), a folder, or an id on the Hub.
        dataset (`str`): `"digits"`, `"opinions"` (instructions with a planted opinion), a folder, or an id on the Hub.
        dataset_revision (`str`, *optional*): revision of a dataset on the Hub.
        split (`str`, defaults to `"train"`): split to train on, whose examples are judged.
        target (`"self"`, *optional*): judge how far each example is learned by heart.
        target_split (`str`, *optional*): split of `dataset` that shows the behaviour.
        target_dataset (`str`, *optional*): folder with rows that show the behaviour. A column `target` tells several apart.
        target_column (`str`, *optional*): values in this column of the target rows tell several behaviours apart.
        wrong_labels (`float`, defaults to 0): share of training labels to be made wrong first, to see whether they are found.
        check_column (`str`, *optional*): column that is true for rows known to be at fault: their recall is printed.
        group_column (`str`, *optional*): print influence by the values of this column too.
        lora_r (`int`, *optional*): train a LoRA adapter of this rank instead of the model.
        lora_alpha (`int`, *optional*): its scale, default twice the rank.
        lora_target_modules (`list[str]`, *optional*): its layers, default all linear ones.
        top (`int`, defaults to 10): examples to print.

    Raises:
        ValueError: a key that is missing, or two that exclude each other.
    """

    _argument_group_name = "model and data"
    is_trained_from: ClassVar[tuple[str, ...]] = tuple(BELONG)  # models that are built, and not loaded

    method: str | None = None
    model: str | None = None
    dataset: str | None = None
    dataset_revision: str | None = None
    split: str = "train"
    target: Literal["self"] | None = None
    target_split: str | None = None
    target_dataset: str | None = None
    target_column: str | None = None
    wrong_labels: float = 0.0
    check_column: str | None = None
    group_column: str | None = None
    lora_r: int | None = None
    lora_alpha: int | None = None
    lora_target_modules: list[str] | None = None
    top: int = 10

    def __post_init__(self):
        for name in ("model", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"{name}: missing; set it to 'digits', 'opinions', a folder, or an id on the Hub")
            if BELONG.get(getattr(self, name), self.method) != self.method:
                word = getattr(self, name)
                raise ValueError(f"{name}: {word!r} belongs to method {BELONG[word]!r}, this is {self.method!r}")
        check_target(self)
        if self.target and self.target_column:
            raise ValueError("target_column: given beside target: self; keep one of them")
        if self.target and self.group_column:
            raise ValueError("group_column: groups have no influence on target: self; keep one of them")
        check_fields(self, {"in [0, 1)": ("wrong_labels",), "≥ 1": ("top",)})
        check_adapter(self)
        if self.lora_r and self.model in ("digits", "opinions"):
            raise ValueError(
                f"lora_r: an adapter of the untrained {self.model!r} would have no base to load; leave it out"
            )

    def defaults(self) -> dict[str, Any]:
        """Settings of the trainer's config that a recipe may leave out."""
        if self.model != "opinions":
            return {}
        from ...examples.opinions import TRAINING

        return TRAINING

    def check_config(self, given: dict[str, Any]) -> None:
        """Refuse keys of the trainer's config that are missing or do not fit.

        Args:
            given (`dict[str, Any]`): those that are there.

        Raises:
            ValueError: naming the key.
        """
        if given.get("n_calibration_runs"):
            raise ValueError(
                "n_calibration_runs: needs model_init, which a recipe cannot give; use InfluenceTrainer in Python"
            )
        if not given.get("output_dir"):
            raise ValueError("output_dir: missing; set it to the folder that gets the model and the report")
        check_is_not_original(given["output_dir"], self.model)
