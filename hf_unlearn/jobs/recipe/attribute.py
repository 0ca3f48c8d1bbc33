"""The keys of a recipe of `hf-unlearn influence` with `method: attribute`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...examples.named import LANGUAGE
from ...training.checks import SEEDS, check_fields, check_is_not_original
from .checks import check_at_most_one, check_small, check_target


@dataclass
class AttributeJob:
    """Asks a model that is already trained which examples taught it a behaviour; nothing is trained.

    Args:
        method (`str`): `"attribute"`.
        model (`str`): `"digits"` (a small classifier), `"opinions"` or `"facts"` (small language models; all three are trained on first
            use), a folder (of an adapter too), or an id on the Hub.
        checkpoints_folder (`str`, *optional*): `output_dir` of its training, with `checkpoint-<step>` folders: influence is then
            unrolled between them and has a unit. Without, it is from the model alone, and orders examples only.
        dataset (`str`): what it was trained on: `"digits"`, `"opinions"`, `"facts"`, a folder, or an id on the Hub.
        dataset_revision (`str`, *optional*): revision of a dataset on the Hub.
        split (`str`, defaults to `"train"`): whose examples are judged.
        target (`"self"`, *optional*): judge how far each example is learned by heart, from the model alone.
        target_split (`str`, *optional*): split of `dataset` that shows the behaviour.
        target_dataset (`str`, *optional*): folder with rows that show the behaviour. A column `target` tells several apart.
        target_column (`str`, *optional*): values in this column of the target rows tell several behaviours apart.
        index_dir (`str`, *optional*): folder of an index: one that is there is asked, else it is built first; later questions are
            answered without the training set's gradients.
        projection (`int`, defaults to 16): with `index_dir`, numbers that each side of a layer's gradient is projected to.
        layers (`list[str]`, *optional*): names or patterns of the modules that are looked at, or with a `!` those that are not; default all
            that are trainable.
        damping (`float`, defaults to 0.1): from the model alone, what is added to the curvature, as a share of its mean in a layer.
        curvature_examples (`int`, defaults to 4096): training examples that the curvature is measured on.
        max_grad_norm (`float`, defaults to 1): with checkpoints, what gradients were clipped to in training; 0 if they were not.
        batch_size (`int`, defaults to 8): examples in one pass.
        max_length (`int`, *optional*): of texts, in tokens.
        id_column (`str`, defaults to `"id"`): column that identifies training examples; the row number where there is none.
        wrong_labels (`float`, defaults to 0): share of training labels to be made wrong first, as the influence recipe does.
        check_column (`str`, *optional*): column that is true for rows known to be at fault: their recall is printed.
        group_column (`str`, *optional*): print influence by the values of this column too.
        top (`int`, defaults to 10): examples to print.
        use_cpu (`bool`, defaults to `False`): although there is a GPU.
        seed (`int`, defaults to 0): of what is drawn.
        output_dir (`str`): the folder that gets the report.

    Raises:
        ValueError: a key that is missing, or two that exclude each other.
    """

    _argument_group_name = "model and data"

    method: str | None = None
    model: str | None = None
    checkpoints_folder: str | None = None
    dataset: str | None = None
    dataset_revision: str | None = None
    split: str = "train"
    target: Literal["self"] | None = None
    target_split: str | None = None
    target_dataset: str | None = None
    target_column: str | None = None
    index_dir: str | None = None
    projection: int = 16
    layers: list[str] | None = None
    damping: float = 0.1
    curvature_examples: int = 4096
    max_grad_norm: float = 1.0
    batch_size: int = 8
    max_length: int | None = None
    id_column: str = "id"
    wrong_labels: float = 0.0
    check_column: str | None = None
    group_column: str | None = None
    top: int = 10
    use_cpu: bool = False
    seed: int = 0
    output_dir: str | None = None

    def __post_init__(self):
        for name, example in (
            ("model", "'digits', 'opinions', a folder, or an id on the Hub"),
            ("dataset", "'digits', 'opinions', a folder, or an id on the Hub"),
            ("output_dir", "the folder that gets the report"),
        ):
            if not getattr(self, name):
                raise ValueError(f"{name}: missing; set it to {example}")
        check_small(self, "model", ("digits", *LANGUAGE))
        check_target(self)
        for name in ("target_column", "group_column", "index_dir", "checkpoints_folder"):
            if self.target and getattr(self, name):
                raise ValueError(f"{name}: given beside target: self; keep one of them")
        check_at_most_one(self, ("checkpoints_folder", "index_dir"))
        ranges = {
            SEEDS: ("seed",), "> 0": ("damping",), "≥ 0": ("max_grad_norm",), "in [0, 1)": ("wrong_labels",),
            "≥ 1": ("projection", "curvature_examples", "batch_size", "max_length", "top"),
        }  # fmt: skip
        check_fields(self, ranges)
        for folder in (self.output_dir, self.index_dir):
            if folder:
                check_is_not_original(folder, self.model)
