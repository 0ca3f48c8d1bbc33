"""The keys of a recipe of `hf-unlearn audit`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...examples.named import DDPMS, GANS, TEXT_TO_IMAGE
from ...training.checks import SEEDS, check_fields, check_is_not_original
from .checks import check_at_most_one, check_device, check_needs


GENERATORS = (*DDPMS, *GANS, *TEXT_TO_IMAGE)
# What each of the small models learnt, of which others are trained without a part of it.
LEARNT = {
    "digits": "digits",
    "facts": None,
    **{name: name.rpartition("-")[0].replace("-", "_") for name in (*DDPMS, *GANS)},
    **dict.fromkeys(TEXT_TO_IMAGE, "coloured-digits"),
}
OF_FACTS = "facts::forget"
SAYS = ("forget_column", "forget_ids", "forget_dataset", "forget_prompts")  # what was to be forgotten


@dataclass
class AuditJob:
    """Attacks an unlearned model, and says how far it is from models that never saw the data.

    Classifiers, causal language models, and pipelines that draw images: which of them it is, the model says itself. Exactly one of `forget_column`
    (with `forget_values`), `forget_ids`, `forget_dataset` and `forget_prompts` says what was to be forgotten.

    Args:
        model (`str`): the unlearned model or pipeline: a folder, or an id on the Hub.
        original (`str`, *optional*): what unlearning started from: a folder, an id, or a small model's name such as `digits`, `facts`, `digits-ddpm`.
        retrained (`list[str]`, *optional*): models trained without the forget rows, each from a seed of its own: at least 3.
        retrain (`int`, defaults to 0): with a small model as `original`, train so many of them on first use: seconds to minutes each.
        dataset (`str`, *optional*): `"digits"`, `"coloured-digits"`, a folder, or an id: see [`hf_unlearn.examples.datasets.load`].
        dataset_revision (`str`, *optional*): of a dataset on the Hub.
        split (`str`, defaults to `"train"`): split that the original was trained on.
        test_split (`str`, *optional*, defaults to `"test"`): split that nobody was trained on.
        forget_column, forget_values (`str`, `list[str]`): the rows with one of these values in this column were to be forgotten.
        forget_ids (`list[str]`): the rows with these ids in `id_column`.
        forget_dataset (`str`): these rows: a folder or an id, also with config and split as in `locuslab/TOFU:forget10:train`.
        forget_prompts (`list[str]`): of a pipeline: what these prompts ask for.
        retain_dataset (`str`, *optional*): rows to keep. Default: the other rows of `split`.
        retain_prompts (`list[str]`, *optional*): of a pipeline: prompts for what is kept.
        test_dataset (`str`, *optional*): rows that nobody was trained on, like the forget rows. Default: `test_split`.
        id_column (`str`, defaults to `"id"`): of the ids.
        chat (`bool`, defaults to `False`): questions and answers become conversations, for a language model with a chat template.
        system_prompt (`str`, *optional*): what the system says first in each.
        chat_template_kwargs (`dict`, *optional*): what the template is told, as in `{date_string: 10 Apr 2025}`.
        marker (`str`, *optional*): of a pipeline: sees what an image shows: `"digits"`, `"coloured-digits"`, a folder or an id of an image classifier.
        classes (`list[str]`, *optional*): names or numbers of the marker's classes that were to go. Default: the labels of the forget rows.
        num_inference_steps, guidance_scale (*optional*): of the images. Default: the pipeline's own.
        device (`str`, *optional*): where models are loaded to, as in `"cuda"`. Default: a GPU, if there is one.
        dtype (`"float16"` | `"bfloat16"`, *optional*): of their weights. Default: float32.
        checks (`list[str]`, *optional*): `standard`, `quick`, or names of checks. Default: standard.
        seed (`int`, defaults to 0): of all that is drawn.
        output_dir (`str`): gets `audit.json`, `audit.html` and `audit.png`.

    Raises:
        ValueError: a key that is missing, or two that exclude each other.
    """

    _argument_group_name = "models and data"
    # What the selection of rows asks of every job.
    eval_split: ClassVar[None] = None
    heldout_split: ClassVar[None] = None
    model: str | None = None
    original: str | None = None
    retrained: list[str] | None = None
    retrain: int = 0
    dataset: str | None = None
    dataset_revision: str | None = None
    split: str = "train"
    test_split: str | None = "test"
    forget_column: str | None = None
    forget_values: list[str] | None = None
    forget_ids: list[str] | None = None
    forget_dataset: str | None = None
    forget_prompts: list[str] | None = None
    retain_dataset: str | None = None
    retain_prompts: list[str] | None = None
    test_dataset: str | None = None
    id_column: str = "id"
    chat: bool = False
    system_prompt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    marker: str | None = None
    classes: list[str] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    device: str | None = None
    dtype: Literal["float16", "bfloat16"] | None = None
    checks: list[str] | None = None
    seed: int = 0
    output_dir: str | None = None

    def __post_init__(self):
        for name, example in (
            ("model", "the folder or the id of the unlearned model"),
            ("output_dir", "the folder that gets the report"),
        ):
            if not getattr(self, name):
                raise ValueError(f"{name}: missing; set it to {example}")
        check_fields(self, {SEEDS: ("seed",), "≥ 0": ("retrain", "guidance_scale"), "≥ 1": ("num_inference_steps",)})
        check_device(self.device)
        self._check_rows()
        self._check_family()
        self._check_retrain()
        if self.original == self.model:
            raise ValueError("original: is the audited model itself; name the model as it was before unlearning")
        check_is_not_original(self.output_dir, self.original)

    @property
    def retain(self) -> bool:
        """Whether the other rows of the split are those to keep."""
        return bool(self.dataset) and not (self.retain_dataset or self.retain_prompts)

    def _check_rows(self) -> None:
        chosen = check_at_most_one(self, SAYS)
        if not chosen:
            raise ValueError(
                f"forget_column: missing; say what was to be forgotten by {', '.join(SAYS[:-1])} or {SAYS[-1]}"
            )
        if bool(self.forget_values) != bool(self.forget_column):
            missing, there = (
                ("forget_values", "forget_column") if self.forget_column else ("forget_column", "forget_values")
            )
            raise ValueError(f"{missing}: missing, which {there} needs")
        if chosen[0] in SAYS[:2] and not self.dataset:
            raise ValueError(
                f"dataset: missing, which {chosen[0]} needs; set it to 'digits', a folder, or an id on the Hub"
            )
        check_at_most_one(self, ("retain_dataset", "retain_prompts"))
        for name in ("forget_prompts", "retain_prompts"):
            if any(not prompt.strip() for prompt in getattr(self, name) or ()):
                raise ValueError(f"{name}: has nothing to ask for; list prompts, or leave it out")

    def _check_family(self) -> None:
        """Keys of pipelines go with a marker, and those of language models without."""
        example = "'digits', a folder, or an id of an image classifier"
        pipelines = ("forget_prompts", "retain_prompts", "classes", "num_inference_steps", "guidance_scale")
        check_needs(self, *((name, "marker", example) for name in pipelines))
        if self.original in GENERATORS and not self.marker:
            raise ValueError(f"marker: missing, which sees what {self.original!r} draws; set it to {example}")
        if self.forget_prompts and not self.classes:
            raise ValueError("classes: missing, which forget_prompts needs; name the marker's classes that were to go")
        check_needs(self, ("system_prompt", "chat", "true"), ("chat_template_kwargs", "chat", "true"))
        if self.chat and self.marker:
            raise ValueError("chat: given beside marker; it is for language models, which need no marker")

    def _check_retrain(self) -> None:
        """Which small models are trained without what was to be forgotten."""
        if not self.retrain:
            return
        if self.original not in LEARNT:
            raise ValueError(
                f"retrain: only small models are trained here (original: {', '.join(LEARNT)}); name yours by retrained"
            )
        data = LEARNT[self.original]
        if data is None:
            if self.forget_dataset != OF_FACTS:
                raise ValueError(
                    f"retrain: models of {self.original!r} are trained without {OF_FACTS!r} alone (forget_dataset)"
                )
            return
        columns = ("digit", "colour", "background") if data == "coloured-digits" else ("label",)
        if self.dataset != data or self.forget_column not in columns:
            raise ValueError(
                f"retrain: models of {self.original!r} are trained without classes of {data!r} alone "
                f"(dataset: {data}, forget_column: {' or '.join(columns)})"
            )
        if self.original in GENERATORS and len(self.forget_values) > 1:
            raise ValueError(
                f"retrain: models of {self.original!r} are trained without one class; give one of forget_values"
            )
