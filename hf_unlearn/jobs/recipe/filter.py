"""The keys of a recipe of `hf-unlearn filter`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ...examples.named import DDPMS, GANS
from ...hub.allowed import FILTERED, PIPELINE
from ...training.checks import SEEDS, check_fields
from .checks import check_at_most_one, check_device, check_needs, check_numbers, check_small


SMALL = (*GANS, *DDPMS)
VERDICTS = "verdicts.json"
WAYS = ("marker", "undesired", "undesired_folder")


@dataclass
class PipelineJob:
    """What draws: the keys that `fit`, `run` and `evaluate` have in common, so that one recipe may serve all three.

    Args:
        pipeline (`str`): `"digits-gan"`, `"fashion-mnist-gan"`, `"digits-ddpm"` or `"fashion-mnist-ddpm"` (small models, trained
            on first use: minutes), a folder, or an id on the Hub.
        pipeline_revision (`str`, *optional*): of a pipeline on the Hub.
        prompts (`list[str]`, *optional*): what a prompted pipeline is asked for, in turn.
        num_inference_steps, guidance_scale (*optional*): of a diffusion pipeline. Default: its own.
        seed (`int`, defaults to 0): of all samples; those of the sheet, the unmarked ones, those of `evaluate` and of `run` are
            different ones.
        batch_size (`int`, defaults to 32): images drawn at a time.
        device (`str`, *optional*): as in `"cuda"`. Default: a GPU, if there is one.
        dtype (`"float16"` | `"bfloat16"`, *optional*): of the pipeline's weights. Default: float32.
        output_dir (`str`): the filter's folder: `fit` writes the filter, `run` its images into `images/` and `evaluate`
            `evaluation.json`.

    Raises:
        ValueError: a key that is missing, or a value that is not allowed.
    """

    _argument_group_name = "pipeline"
    _ranges: ClassVar[dict[str, tuple[str, ...]]] = {}

    pipeline: str | None = None
    pipeline_revision: str | None = None
    prompts: list[str] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    batch_size: int = 32
    device: str | None = None
    dtype: Literal["float16", "bfloat16"] | None = None
    output_dir: str | None = None

    def __post_init__(self):
        if not self.pipeline:
            raise ValueError(
                f"pipeline: missing; set it to {', '.join(map(repr, SMALL))}, a folder, or an id on the Hub"
            )
        check_small(self, "pipeline", SMALL)
        if not self.output_dir:
            raise ValueError("output_dir: missing; set it to the folder of the filter")
        if self.prompts is not None and not (self.prompts and all(prompt.strip() for prompt in self.prompts)):
            raise ValueError("prompts: has nothing to ask for; list some, or leave it out")
        check_fields(self, {"≥ 1": ("batch_size", "num_inference_steps"), SEEDS: ("seed",)} | self._ranges)
        check_device(self.device)
        if self.pipeline in SMALL:
            for name in ("pipeline_revision", "prompts", "guidance_scale", "dtype"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: {self.pipeline!r} has none; leave it out")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)


@dataclass
class FilterFitJob(PipelineJob):
    """What is to be filtered: the keys of `hf-unlearn filter fit` besides those of [`PipelineJob`].

    What is undesired is said by marks: by a classifier that plays the user (`marker` with `classes`), by numbers on a
    sheet of samples (`undesired`), or by a folder of images (`undesired_folder`). With none of the three the job writes the
    sheet and ends.

    Args:
        encoder (`str`, *optional*): sees the images: `"digits"` (a classifier without its head), a folder or an id of an image
            model. `None`: the generator's own latents are filtered, of a [`GANPipeline`].
        encoder_revision, encoder_layer, encoder_pooling, store_encoder (*optional*): see [`FilterEncoder.from_pretrained`].
        concept, description (`str`): what is filtered, for people.
        marker (`str`, *optional*): `"digits"`, a folder or an id of an image classifier: of `looked_at` samples those that it
            sees one of `classes` in are undesired, all others clean.
        classes (`list[str]`, *optional*): names or numbers of its classes.
        marks (`int`, *optional*): undesired marks that it gives at most. Default: all.
        undesired (`list[int]`, *optional*): numbers on the sheet of the samples that show it; all others there are clean.
        looked_at (`int`, defaults to 200): samples that are looked at, by `marker` or on the sheet.
        undesired_folder, clean_folder (`str`, *optional*): image files, or a dataset written by `save_to_disk`.
        unmarked (`int`, defaults to 2,000): further samples, which nobody looks at.
        score, threshold, rate, confidence, max_prevalence, prevalence, augment (*optional*): see [`FASTFitter`] and its `fit`.
        pipeline_dir (`str`, *optional*): gets the pipeline with its filter, to be loaded as one.
        action (`str`, *optional*): of the pipeline there.

    Raises:
        ValueError: a key that is missing, two that exclude each other, or a value that is not allowed.
    """

    _argument_group_name = "filter"
    _ranges = {
        "≥ 2": ("marks",),
        "≥ 0": ("unmarked", "augment"),
        "in (0, 1)": ("rate", "confidence", "max_prevalence", "prevalence"),
    }

    encoder: str | None = None
    encoder_revision: str | None = None
    encoder_layer: int | None = None
    encoder_pooling: Literal["pooled", "mean", "first"] | None = None
    store_encoder: bool = True
    concept: str = "undesired"
    description: str = ""
    marker: str | None = None
    classes: list[str] | None = None
    marks: int | None = None
    undesired: list[int] | None = None
    looked_at: int = 200
    undesired_folder: str | None = None
    clean_folder: str | None = None
    unmarked: int = 2000
    score: Literal["quadratic", "lda", "linear_svc", "mean_difference"] = "quadratic"
    threshold: Literal["max_false_alarm", "min_recall", "pooled_mean"] = "max_false_alarm"
    rate: float | None = None
    confidence: float = 0.95
    max_prevalence: float | None = None
    prevalence: float | None = None
    augment: int = 0
    pipeline_dir: str | None = None
    action: Literal["blank", "blur", "flag", "regenerate", "raise"] | None = None

    def __post_init__(self):
        super().__post_init__()
        if not self.concept.strip():
            raise ValueError("concept: is empty; name what is filtered, as in 'weapons'")
        self._check_encoder()
        self._check_marks()
        self._check_threshold()
        self._check_folders()

    @property
    def marked(self) -> bool:
        return any(getattr(self, way) is not None for way in WAYS)

    def _check_encoder(self) -> None:
        for name in ("encoder_revision", "encoder_layer", "encoder_pooling"):
            if getattr(self, name) is not None and self.encoder is None:
                raise ValueError(f"encoder: missing, which {name} needs; set it to 'digits', a folder, or an id")
        if not self.store_encoder and (self.encoder in (None, "digits") or Path(self.encoder).is_dir()):
            raise ValueError("store_encoder=False: only an encoder on the Hub can be referred to; leave it out")

    def _check_marks(self) -> None:
        check_at_most_one(self, WAYS)
        check_needs(
            self,
            ("marker", "classes", "the classes that it is to mark, as in [3]"),
            ("marks", "marker", "'digits', a folder, or an id"),
            ("clean_folder", "undesired_folder", "a folder of images that show what is undesired"),
            ("undesired_folder", "encoder", "'digits', a folder, or an id: images have no latents"),
        )
        check_numbers(self.undesired, self.looked_at, others="clean")

    def _check_threshold(self) -> None:
        if self.threshold == "pooled_mean" and self.rate is not None:
            raise ValueError("rate: given beside threshold: pooled_mean, which promises nothing; leave it out")
        if self.max_prevalence is not None and self.threshold != "max_false_alarm":
            raise ValueError("max_prevalence: is for threshold: max_false_alarm only; leave it out")
        if self.augment and self.score == "quadratic":
            raise ValueError(
                "augment: is for linear scores; leave it out, or set score to mean_difference or linear_svc"
            )
        unmarked_clean = self.undesired_folder is not None and self.clean_folder is None
        if self.threshold == "max_false_alarm" and self.max_prevalence is None and unmarked_clean:
            raise ValueError(
                "clean_folder: missing, which threshold: max_false_alarm is calibrated on; set it, or max_prevalence, or "
                "another threshold"
            )

    def _check_folders(self) -> None:
        written = [
            name
            for name in ("config.json", "model.safetensors", "README.md", PIPELINE)
            if (self.folder / name).exists()
        ]
        if written and not holds_a_filter(self.folder):
            raise ValueError(
                f"output_dir: {self.output_dir!r} holds {written[0]}, which is of no filter; choose another folder"
            )
        if self.pipeline_dir is None:
            return
        folder = Path(self.pipeline_dir)
        if folder.resolve() == self.folder.resolve():
            raise ValueError("pipeline_dir: is output_dir too; choose another folder")
        if folder.is_dir() and any(folder.iterdir()) and _said(folder / PIPELINE, "_class_name") != FILTERED:
            raise ValueError(f"pipeline_dir: {self.pipeline_dir!r} holds something else; choose another folder")


@dataclass
class FilterRunJob(PipelineJob):
    """What is drawn through which filter: the keys of `hf-unlearn filter run` besides those of [`PipelineJob`].

    Args:
        filter (`str`, *optional*): folder or id of a filter. Default: the one in `output_dir`; a pipeline that was saved with a
            filter has its own.
        filter_revision (`str`, *optional*): of a filter on the Hub.
        num_images (`int`, *optional*): how many. Default: one a prompt, or 36.
        action (`str`, *optional*): what happens to images that are not released, see [`FilteredPipeline`]. Default: as
            saved, or `"blank"`. `"raise"`: no image is written if one is not released.
        max_tries (`int`, *optional*): further draws of `"regenerate"`.
        images_dir (`str`, *optional*): gets the images and `verdicts.json`. Default: `images` in `output_dir`.

    Raises:
        ValueError: a key that is missing, or a value that is not allowed.
    """

    _argument_group_name = "filter and images"
    _ranges = {"≥ 1": ("num_images", "max_tries")}

    filter: str | None = None
    filter_revision: str | None = None
    num_images: int | None = None
    action: Literal["blank", "blur", "flag", "regenerate", "raise"] | None = None
    max_tries: int | None = None
    images_dir: str | None = None

    def __post_init__(self):
        super().__post_init__()
        folder = self.images_folder
        if folder.is_dir() and any(folder.iterdir()) and not (folder / VERDICTS).is_file():
            raise ValueError(f"images_dir: {str(folder)!r} holds something else; choose another folder")

    @property
    def images_folder(self) -> Path:
        return Path(self.images_dir) if self.images_dir else self.folder / "images"


@dataclass
class FilterEvaluateJob(PipelineJob):
    """Who judges what: the keys of `hf-unlearn filter evaluate` besides those of [`PipelineJob`].

    Args:
        filter, filter_revision (`str`, *optional*): as for `run`.
        concept (`str`, *optional*): of a filter with several.
        classifier (`str`): `"digits"`, a folder or an id of an image classifier: a sample is undesired if it sees one of
            `classes` in it. Not the one that marked, nor the filter's encoder, or the figures flatter.
        classes (`list[str]`): names or numbers of its classes.
        samples (`int`, defaults to 2,000): that are drawn; others than those of `fit`.
        dataset, eval_split (`str`, *optional*): real images, and the split of them: those of the other classes are what samples
            are compared with, before and after the filter. Their labels are the classifier's numbers.
        dataset_revision (`str`, *optional*): of a dataset on the Hub.
        resize (`bool`, defaults to `False`): fit the real images to what the pipeline draws.

    Raises:
        ValueError: a key that is missing, or a value that is not allowed.
    """

    _argument_group_name = "filter and judge"
    _ranges = {"≥ 2": ("samples",)}

    filter: str | None = None
    filter_revision: str | None = None
    concept: str | None = None
    classifier: str | None = None
    classes: list[str] | None = None
    samples: int = 2000
    dataset: str | None = None
    dataset_revision: str | None = None
    eval_split: str | None = None
    resize: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not self.classifier:
            raise ValueError("classifier: missing; set it to 'digits', a folder, or an id of an image classifier")
        if not self.classes:
            raise ValueError("classes: missing; list the classes that are undesired, as in [3]")
        check_needs(
            self,
            ("dataset_revision", "dataset", "an id on the Hub"),
            ("eval_split", "dataset", "'digits', a folder, or an id"),
            ("dataset", "eval_split", "the split to compare with, as in test"),
        )


def holds_a_filter(folder: Path) -> bool:
    return _said(folder / "config.json", "model_type") == "fast_safety_checker"


def _said(file: Path, key: str) -> Any:
    """A value in a JSON file; None where there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError):
        return None
