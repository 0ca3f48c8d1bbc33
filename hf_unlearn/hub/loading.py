"""The lines of code that load what is saved, and what kind of thing it is."""

from __future__ import annotations

import importlib
import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

from .allowed import CONFIG, LORA, PIPELINE


# of pipelines that need more than a prompt, or make something other than images
OTHER_INPUTS = {"image", "control_image", "mask_image", "video", "num_frames", "video_length", "audio_length_in_s"}


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
    if is_pipeline(model_class):
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


def class_in(folder: Path) -> type | None:
    """Class of the model or the pipeline that a folder holds; None for an adapter, or one that no library here has."""
    import diffusers
    import transformers

    import hf_unlearn

    index, config = (_json(folder / name) for name in (PIPELINE, CONFIG))
    name = index.get("_class_name") or (config.get("architectures") or [""])[0]
    libraries = (hf_unlearn, diffusers) if index else (hf_unlearn, transformers)
    return next((found for library in libraries if name and (found := getattr(library, name, None)) is not None), None)


def loaded(folder: Path) -> Any:
    """The model, in fp32 as an audit loads it, or the pipeline in a folder.

    Raises:
        ValueError: nothing that a class of these libraries loads.
    """
    import torch

    kind = class_in(folder)
    if kind is None:
        raise ValueError(
            f"folder={str(folder)!r}: names no class that loads it, so that an audit of it cannot be told; leave audit out"
        )
    return kind.from_pretrained(str(folder), **({} if is_pipeline(kind) else {"dtype": torch.float32}))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def processor_loader(processing_class: Any) -> str | None:
    """The Auto class that loads what is saved as `processing_class`; None of None."""
    from transformers import FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin

    if processing_class is None:
        return None
    kinds = {
        PreTrainedTokenizerBase: "AutoTokenizer",
        ProcessorMixin: "AutoProcessor",
        FeatureExtractionMixin: "AutoFeatureExtractor",
    }
    return next((name for kind, name in kinds.items() if isinstance(processing_class, kind)), "AutoImageProcessor")


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


def is_pipeline(model_class: type) -> bool:
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
    for name in _auto_classes():
        mapping = getattr(getattr(transformers, name), "_model_mapping", None)
        if mapping is not None and config_class in mapping and mapping[config_class] is model_class:
            return name
    return None


@cache  # dir() of transformers 5.23 compares each of its thousands of names with all of them
def _auto_classes() -> list[str]:
    import transformers

    # AutoModelForPreTraining also lists models that have an Auto class that says more.
    return sorted({name for name in dir(transformers) if name.startswith("AutoModel")} - {"AutoModelForPreTraining"})
