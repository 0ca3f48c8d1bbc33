"""What a checkpoint on the Hub or in a folder holds for an encoder: model class, weights, settings of sentence-transformers."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from ...files import first_line
from .preprocessing import ImagePreprocessing


KINDS = ("image", "text", "custom")
POOLINGS = ("pooled", "mean", "first")
# Of a filter or a pipeline on the Hub: what may be asked for, and which files are fetched.
HUB_OPTIONS = ("cache_dir", "token", "local_files_only", "force_download")
# Of a config: where it was loaded, code and kernels to fetch, and what only a head needs.
NOT_IN_SPEC = re.compile(
    r"_?name_or_path|_commit_hash|auto_map|architectures|quantization_config|id2label|label2id|.*_implementation.*"
)


def is_of_transformers(model_class: Any) -> bool:
    is_model = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)
    return is_model and model_class.__module__.startswith("transformers.")


def has_optional_pooler(model_class: type) -> bool:
    """ViT, BERT and others: checkpoints of heads that do without it leave it out, and it would be random."""
    return "add_pooling_layer" in inspect.signature(model_class.__init__).parameters


def model_class_of(config: Any, name: str) -> type[PreTrainedModel]:
    """Of the part of a checkpoint that makes an embedding."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    towers = {
        "clip": "CLIPVisionModelWithProjection",
        "clip_vision_model": "CLIPVisionModelWithProjection",
        "siglip": "SiglipVisionModel",
    }
    if config.model_type in towers and config.architectures != ["CLIPVisionModel"]:  # that has no projection
        return getattr(transformers, towers[config.model_type])
    model_class = MODEL_MAPPING.get(type(config), None)
    fits = is_of_transformers(model_class) and model_class.main_input_name in ("pixel_values", "input_ids")
    if not fits or config.sub_configs or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"name_or_path: {name!r} ({config.model_type}) is neither one image encoder nor one text encoder; load the "
            "part that you need and pass it to FilterEncoder or FilterEncoder.own"
        )
    return model_class


def load_weights(model_class: type[PreTrainedModel], name: str, **arguments: Any) -> PreTrainedModel:
    """A checkpoint's weights, all of them; that it has others too, of a head, is not worth a report."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are refused below
        model, info = in_one_line(model_class.from_pretrained, name, **arguments)
    finally:
        logging.set_verbosity(verbosity)
    if random := sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}):
        raise ValueError(
            f"name_or_path: {name!r} lacks {len(random)} weights of {model_class.__name__}, such as {random[0]!r}, "
            "which would be random; use a checkpoint with them, or another pooling"
        )
    return model.eval().requires_grad_(False)


def hub_options_of(options: dict[str, Any]) -> dict[str, Any]:
    if "trust_remote_code" in options:
        raise ValueError(
            "trust_remote_code: is not taken; load such a model yourself and pass it to FilterEncoder.own"
        )
    if unknown := options.keys() - set(HUB_OPTIONS):
        raise ValueError(f"{min(unknown)}: is not an option; those of the Hub are {', '.join(HUB_OPTIONS)}")
    return options


def commit_of(name: str, source: dict[str, Any]) -> str | None:
    """The commit that a revision is now, so that all files are of one."""
    from transformers.utils import cached_file

    path = in_one_line(cached_file, name, "config.json", **source)
    found = re.search(r"snapshots/([0-9a-f]{40})/", Path(path).as_posix())
    return found[1] if found else source["revision"]


def sentence_settings(
    name: str, source: dict[str, Any], pooling: str | None, max_length: int | None, layer: int | None
) -> tuple[str | None, int | None]:
    """What sentence-transformers keeps beside a model, where nothing else is asked for."""
    from transformers.utils import cached_file

    def read(file: str) -> dict[str, Any]:
        try:
            return json.loads(Path(cached_file(name, file, **source)).read_text(encoding="utf-8"))
        except OSError:  # no such file
            return {}

    max_length = max_length or read("sentence_bert_config.json").get("max_seq_length")
    settings = read("1_Pooling/config.json") if pooling is None and layer is None else {}
    modes = {mode.removeprefix("pooling_mode_") for mode, on in settings.items() if on is True and "_mode_" in mode}
    modes |= {settings["pooling_mode"]} if isinstance(settings.get("pooling_mode"), str) else set()
    if not modes:
        return pooling, max_length
    known = {"mean_tokens": "mean", "mean": "mean", "cls_token": "first", "cls": "first"}
    if len(modes) > 1 or not modes <= known.keys():
        raise ValueError(f"pooling: {name!r} was trained with {sorted(modes)}; choose one of {', '.join(POOLINGS)}")
    return known[modes.pop()], max_length


def read_spec(spec: dict[str, Any]) -> tuple[type[PreTrainedModel], Any, dict[str, Any]]:
    """Model class, config and arguments of the encoder."""
    import transformers

    if not isinstance(spec, dict) or spec.get("kind") not in KINDS:
        raise ValueError("spec: is not one of a FilterEncoder")
    if spec["kind"] == "custom":
        raise ValueError(f"encoder: {spec.get('name')!r} is the user's own and was not stored; pass encoder=")
    model_class = getattr(transformers, str(spec.get("architecture")), None)
    if not is_of_transformers(model_class):
        raise ValueError(f"spec: architecture {spec.get('architecture')!r} is not a model of transformers")
    names = ("layer", "pooling", "normalize", "max_length", "reference", "name", "embedding_size")
    try:
        config = {key: value for key, value in spec["config"].items() if not NOT_IN_SPEC.fullmatch(key)}
        arguments = {name: spec[name] for name in names} | {"kind": spec["kind"]}
        arguments["preprocessing"] = spec["preprocessing"] and ImagePreprocessing(**spec["preprocessing"])
        return model_class, model_class.config_class.from_dict(config), arguments
    except (KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ValueError(f"spec: is incomplete or of another version ({first_line(error)})") from error


def pooler_of(spec: dict[str, Any]) -> dict[str, bool]:
    return {"add_pooling_layer": spec["add_pooling_layer"]} if "add_pooling_layer" in spec else {}


def dtype_of(name: Any) -> torch.dtype:
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"spec: dtype {name!r} is none of torch")
    return dtype


def in_one_line(load: Callable[..., Any], name: str, *arguments: Any, **options: Any) -> Any:
    """What transformers loads, or its error without the advice that does not apply."""
    try:
        return load(name, *arguments, **options)
    except Exception as error:  # tokenizers 0.23 raises it bare for a broken file
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"name_or_path: {name!r} cannot be loaded ({first_line(error)})") from error
