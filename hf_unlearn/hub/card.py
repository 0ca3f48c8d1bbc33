"""The model card of an unlearned model: what was forgotten, how, the figures, and what they do not show."""

from __future__ import annotations

import importlib
import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .allowed import LORA
from .provenance import Provenance


if TYPE_CHECKING:
    from huggingface_hub import ModelCard


TAGS = ("machine-unlearning", "hf_unlearn")
# of pipelines that need more than a prompt, or make something other than images
OTHER_INPUTS = {"image", "control_image", "mask_image", "video", "num_frames", "video_length", "audio_length_in_s"}
TEMPLATE = Path(__file__).with_name("unlearning_card.md.jinja")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number and what to compare it with.

    Args:
        metric (`str`): id of the metric on the Hub, as in `"accuracy"`.
        name (`str`): what the table calls it, as in `"Accuracy on the forgotten class"`.
        after (`float`): of the unlearned model; this one goes to `model-index`.
        before (`float`, *optional*): of the model that unlearning started from.
        retrained (`float`, *optional*): of a model trained without the forget set.
        split (`str`, defaults to `"test"`): of the data it was measured on.
        unit (`str`, defaults to `"%"`): of all three; `""` for plain numbers.

    Raises:
        ValueError: a number that is not finite.
    """

    metric: str
    name: str
    after: float
    before: float | None = None
    retrained: float | None = None
    split: str = "test"
    unit: str = "%"

    def __post_init__(self) -> None:
        for name in ("before", "after", "retrained"):
            value = getattr(self, name)
            if value is None and name != "after":
                continue
            if value is None or not math.isfinite(value):
                raise ValueError(f"{name}={value} of {self.name!r}: must be a finite number; leave the figure out")


def loading_code(
    model_class: type,
    model_name: str,
    *,
    processor: str | None = None,
    lora_base: str | None = None,
    num_inference_steps: int | None = None,
) -> str:
    """Lines of Python that load a saved model, or a pipeline and draw one image from it, with stock libraries.

    Args:
        model_class (`type`): class of the saved model, whose Auto class is used if it has one, or of the pipeline.
        model_name (`str`): repository id or folder.
        processor (`str`, *optional*): class in transformers that loads what was saved beside the model, as in
            `"AutoTokenizer"` or `"AutoImageProcessor"`. A pipeline loads its own.
        lora_base (`str`, *optional*): repository id or folder of the pipeline that `model_name`, a LoRA file, was made for.
        num_inference_steps (`int`, *optional*): denoising steps of the image, > 0. Default: the pipeline's, which is
            1,000 for `DDPMPipeline` and fails there if the model was trained with fewer.

    Raises:
        ValueError: a `processor` for a pipeline, or `lora_base` or `num_inference_steps` for another model.
    """
    if _is_pipeline(model_class):
        if processor is not None:
            raise ValueError(f"processor={processor!r}: {model_class.__name__} loads its own; leave it out")
        return _pipeline_code(model_class, model_name, lora_base, num_inference_steps)
    for name, value in (("lora_base", lora_base), ("num_inference_steps", num_inference_steps)):
        if value is not None:
            raise ValueError(f"{name}={value!r}: {model_class.__name__} is no DiffusionPipeline; leave it out")

    import transformers

    name = _auto_class(model_class) or model_class.__name__
    module = "transformers" if hasattr(transformers, name) else model_class.__module__
    imports = {module: [name]}
    lines = [f"model = {name}.from_pretrained({json.dumps(model_name)})"]
    if processor is not None:
        imports.setdefault("transformers", []).append(processor)
        lines.append(f"processor = {processor}.from_pretrained({json.dumps(model_name)})")
    header = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())]
    return "\n".join([*header, "", *lines])


def diffusion_task(pipeline_class: type) -> str | None:
    """`pipeline_tag` of a diffusion pipeline on the Hub, by what its `__call__` takes; None where neither fits.

    Args:
        pipeline_class (`type`): a `DiffusionPipeline` class.

    Returns:
        `str`: `"text-to-image"` if a prompt is all that it needs, `"unconditional-image-generation"` if it needs nothing.
    """
    parameters = dict(inspect.signature(pipeline_class.__call__).parameters)
    parameters.pop("self", None)
    required = {p.name for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    # Most inputs default to None in the signature and are asked for later.
    if "generator" not in parameters or not OTHER_INPUTS.isdisjoint(parameters):
        return None
    if {"prompt", "height"} <= parameters.keys() and required <= {"prompt"}:
        return "text-to-image"
    if "batch_size" in parameters and "prompt" not in parameters and not required:
        return "unconditional-image-generation"
    return None


def unlearning_card(
    provenance: Provenance,
    *,
    model_name: str,
    task: str | None = None,
    pipeline_tag: str | None = None,
    library_name: str = "transformers",
    license: str | None = None,
    tags: Sequence[str] = (),
    results: Sequence[Figure] = (),
    failed_checks: Sequence[str] = (),
    limitations: Sequence[str] = (),
    load_snippet: str | None = None,
    picture: str | None = None,
    dataset_name: str = "unknown",
    dataset_type: str = "unknown",
) -> ModelCard:
    """The card of an unlearned model.

    Args:
        provenance ([`Provenance`]): how it was made.
        model_name (`str`): title, and name in `model-index`.
        task (`str`, *optional*): task in `model-index`. Default: `pipeline_tag`.
        pipeline_tag (`str`, *optional*): task of the model on the Hub, as in `"image-classification"`. Of a pipeline:
            see [`diffusion_task`].
        library_name (`str`, defaults to `"transformers"`): what loads the model: `"diffusers"` for a pipeline.
        license (`str`, *optional*): id of the license, as in `"apache-2.0"`.
        tags (`Sequence[str]`, defaults to `()`): besides [`TAGS`].
        results (`Sequence[Figure]`, defaults to `()`): what was measured. Without any, the card says so.
        failed_checks (`Sequence[str]`, defaults to `()`): one line for each check that did not pass.
        limitations (`Sequence[str]`, defaults to `()`): besides those that every unlearned model has.
        load_snippet (`str`, *optional*): Python that loads the model: see [`loading_code`]. Default: no such section.
        picture (`str`, *optional*): path beside the card, as in `"pictures/classes.png"`.
        dataset_name (`str`, defaults to `"unknown"`): of the data measured on, for readers.
        dataset_type (`str`, defaults to `"unknown"`): of the data measured on: its id on the Hub.

    Returns:
        `ModelCard`: `card.save(folder / "README.md")` writes it.

    Raises:
        ValueError: a picture that a push would leave behind.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    if picture is not None and (Path(picture).parent.as_posix() != "pictures" or not picture.endswith(".png")):
        raise ValueError(f"picture={picture!r}: must be pictures/NAME.png, the only pictures that are published")
    base_id = hub_id(provenance.base_model)
    evaluations = [
        EvalResult(
            task_type=task or pipeline_tag or "other",
            dataset_type=dataset_type,
            dataset_name=dataset_name,
            dataset_split=figure.split,
            metric_type=figure.metric,
            metric_name=figure.name,
            metric_value=float(figure.after),
        )
        for figure in results
    ]
    data = ModelCardData(
        base_model=base_id,
        eval_results=evaluations or None,
        library_name=library_name,
        license=license,
        metrics=sorted({figure.metric for figure in results}) or None,
        model_name=model_name,
        pipeline_tag=pipeline_tag,
        tags=[*TAGS, *tags],
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=_line(model_name),
        method=_line(provenance.method),
        method_title=_line(provenance.method_title),
        paper=provenance.paper,
        forgotten=_line(provenance.forgotten),
        forget_examples=provenance.forget_examples,
        forget_fingerprint=provenance.forget_fingerprint,
        base_model_link=_base_model_link(provenance.base_model, base_id),
        base_revision=provenance.base_revision,
        steps=provenance.steps,
        seed=provenance.seed,
        created=provenance.created,
        hyperparameters=[
            (name, _line(json.dumps(value, ensure_ascii=False)))
            for name, value in sorted(provenance.hyperparameters.items())
        ],
        versions=", ".join(f"{name} {number}" for name, number in provenance.versions.items()),
        rows=[
            [_line(figure.name), _line(figure.split)]
            + [_shown(value, figure.unit) for value in (figure.before, figure.after, figure.retrained)]
            for figure in results
        ],
        has_retrained=any(figure.retrained is not None for figure in results),
        failed_checks=[_line(check) for check in failed_checks],
        limitations=[_line(limitation) for limitation in limitations],
        load_snippet=load_snippet,
        picture=picture,
    )


def _is_pipeline(model_class: type) -> bool:
    """Without importing diffusers, which takes seconds."""
    return any(
        base.__name__ == "DiffusionPipeline" and base.__module__.startswith("diffusers.")
        for base in model_class.__mro__
    )


def _pipeline_code(
    pipeline_class: type, model_name: str, lora_base: str | None, num_inference_steps: int | None
) -> str:
    name, package = pipeline_class.__name__, pipeline_class.__module__.split(".")[0]
    exported = getattr(importlib.import_module(package), name, None) is pipeline_class
    module = package if exported else pipeline_class.__module__
    lines = [f"from {module} import {name}", ""]
    if lora_base is None:
        lines.append(f"pipeline = {name}.from_pretrained({json.dumps(model_name)})")
    else:
        weights = (
            f'weight_name={json.dumps(LORA)}, adapter_name="unlearned"'  # without a name, it is not found offline
        )
        lines += [
            f"pipeline = {name}.from_pretrained({json.dumps(lora_base)})",
            f"pipeline.load_lora_weights({json.dumps(model_name)}, {weights})",
            'pipeline.set_adapters("unlearned", 1.0)',
        ]
    task = diffusion_task(pipeline_class)
    if task is None:
        return "\n".join(lines)
    taken = inspect.signature(pipeline_class.__call__).parameters
    counted = "num_images" if "num_images" in taken else "batch_size"
    inputs = '"a photo"' if task == "text-to-image" else f"{counted}=1"
    if num_inference_steps is not None:
        inputs += f", num_inference_steps={num_inference_steps}"
    lines.append(f"image = pipeline({inputs}, generator=torch.Generator().manual_seed(0)).images[0]")
    return "\n".join(["import torch", *lines])


def _auto_class(model_class: Any) -> str | None:
    import transformers

    config_class = getattr(model_class, "config_class", None)
    for name in sorted(dir(transformers)):
        # AutoModelForPreTraining also lists models that have an Auto class that says more.
        if name.startswith("AutoModel") and name != "AutoModelForPreTraining":
            mapping = getattr(getattr(transformers, name), "_model_mapping", None)
            if mapping is not None and config_class in mapping and mapping[config_class] is model_class:
                return name
    return None


def hub_id(base_model: str | None) -> str | None:
    """`base_model` where it is an id on the Hub: the Hub refuses others as metadata, and a path is nobody's business."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if base_model is None or Path(base_model).exists():
        return None
    try:
        validate_repo_id(base_model)
    except HFValidationError:
        return None
    return base_model


def _base_model_link(base_model: str | None, hub_id: str | None) -> str | None:
    if base_model is None:
        return None
    if hub_id is None:
        return "a model that is not on the Hub"
    return f"[{hub_id}](https://huggingface.co/{hub_id})"


def _line(text: str) -> str:
    """Text that stays in one line and one table cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    return f"{value:.2f} {unit}" if unit else f"{value:.4g}"
