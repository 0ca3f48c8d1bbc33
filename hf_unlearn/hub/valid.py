"""What the Hub refuses in the metadata of a card, found here, before anything is sent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from .origin import as_id


BLOCK = re.compile(r"\A---[ \t]*\r?\n(?:(.*?)\r?\n)??---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
WORD = re.compile(r"[a-z0-9][a-z0-9.+-]*")
LANGUAGE = re.compile(r"[a-z]{2,8}(-[A-Za-z0-9]{2,8})*")
RELATIONS = ("adapter", "finetune", "merge", "quantized")
# Fields that hold one text or a list of them, and what each of them must look like.
TEXTS = {
    "license": (WORD.fullmatch, "the Hub's id of a license, as in mit, or other with license_name"),
    "language": (LANGUAGE.fullmatch, "a code, as in en"),
    "library_name": (re.compile(r"[a-z0-9][\w.-]*").fullmatch, "a name in lower case"),
    "pipeline_tag": (WORD.fullmatch, "a task, as in image-classification"),
    "base_model": (as_id, "the id of a model"),
    "datasets": (as_id, "the id of a dataset"),
    "source_datasets": (as_id, "the id of a dataset"),
    "tags": (str.strip, "a text"),
    "metrics": (str.strip, "a text"),
}
SINGLE = ("library_name", "pipeline_tag")


def check_card(text: str) -> None:
    """Refuse a card whose metadata the Hub would not take: after the rules that `ModelCard.validate` asks it for.

    Args:
        text (`str`): README.md.

    Raises:
        ValueError: naming the field, what is there, and what must be.
    """
    found = BLOCK.match(text)
    if found is None:
        if text.startswith("---"):
            raise ValueError("README.md: its metadata have no end; close them with a line of ---")
        return
    try:
        data = yaml.safe_load(found[1] or "")
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"README.md: its metadata are no YAML ({said[:200]}); write them anew") from error
    if data is None:
        return
    if not isinstance(data, Mapping):
        raise ValueError(f"README.md: its metadata are a {type(data).__name__}; must be 'name: value' lines")
    for name, (fits, what) in TEXTS.items():
        given = data.get(name)
        values = given if isinstance(given, list) and name not in SINGLE else [] if given is None else [given]
        for value in values:
            if not isinstance(value, str) or not fits(value):
                raise ValueError(f"README.md: {name}: {_shown(value)} is not {what}")
    relation = data.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        raise ValueError(f"README.md: base_model_relation: {_shown(relation)} is none of {', '.join(RELATIONS)}")
    if data.get("license") == "other" and "license_link" in data and "license_name" not in data:
        raise ValueError("README.md: license_name: missing, which license: other needs")
    _check_index(data.get("model-index"))


def _check_index(index: Any) -> None:
    if index is None:
        return
    where = "README.md: model-index"
    if not isinstance(index, list) or not all(isinstance(model, Mapping) for model in index):
        raise ValueError(f"{where}: must be a list of models")
    for model in index:
        if not isinstance(model.get("name"), str) or not model["name"].strip():
            raise ValueError(f"{where}: a model has no name")
        for result in model.get("results") or ():
            for part, field in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                if not isinstance((result.get(part) or {}).get(field), str):
                    raise ValueError(f"{where}: a result of {_shown(model['name'])} has no {part}.{field}")
            metrics = result.get("metrics")
            if not metrics or not all(isinstance(one.get("type"), str) and "value" in one for one in metrics):
                raise ValueError(f"{where}: a metric of {_shown(model['name'])} has no type or no value")


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:79]}…"
