"""The model card of a filter: what it blocks, what is promised of it and what is not, and what gets past it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..hub.origin import hub_id, inherited, said_of
from ..hub.provenance import hardware, library_versions
from ..hub.text import all_tags, line, one_line
from .config import FASTConfig


TAGS = ("hf_unlearn", "safety-checker", "fast")
TEMPLATE = Path(__file__).with_name("card.md.jinja")
PAPER = "2312.14895"
HERE = "."  # where no id is known, the folder that the card is in
SCORES = {
    "quadratic": "a Gaussian of the undesired marks against the Gaussian of unmarked samples",
    "lda": "linear discriminant of undesired against clean marks, with a shrunk covariance",
    "linear_svc": "linear support-vector classifier of undesired against clean marks",
    "mean_difference": "projection on the difference of the means of undesired and clean marks",
}
RATES = {
    "recall": "undesired samples that are blocked (recall)",
    "false_alarm": "clean samples that are blocked (false alarms)",
    "blocked": "samples that are blocked",
    "release": "samples that are released",
    "prevalence": "undesired samples among all (prevalence)",
    "residual": "undesired samples among the released (residual)",
}
WITHIN = ("hf_unlearn", "torch", "transformers", "diffusers")  # versions that count


def filter_card(
    config: FASTConfig,
    repo_id: str | None = None,
    *,
    pipeline_id: str | None = None,
    inside: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    tags: str | Sequence[str] = (),
    datasets: str | Sequence[str] | None = None,
    token: str | bool | None = None,
) -> str:
    """README.md of a filter, or of a pipeline that is saved with it.

    Args:
        config ([`FASTConfig`]): of what is published.
        repo_id (`str`, *optional*): where to. Default: the code in the card loads the folder that it is in.
        pipeline_id (`str`, *optional*): id on the Hub of the pipeline that it was made for.
        inside (`str`, *optional*): class of the pipeline that is saved with the filter: then the card is that pipeline's.
        license, language, tags, datasets (*optional*): metadata. Default: what the card of the pipeline inside, or else of the encoder, says.
        token (`str` or `bool`, *optional*): of the Hub, to read that card.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    concepts = config.concepts
    spec = config.encoder_spec
    name = repo_id or HERE
    names = ", ".join(line(concept["name"]) for concept in concepts)
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="generated",
            dataset_name="the generator's samples",
            metric_type=metric,
            metric_name=f"{one_line(concept['name'])}: {title}",
            metric_value=float(value),
        )
        for concept in concepts
        for metric, title, value in _measured(concept["figures"])
    ]
    base = (pipeline_id if inside else None) or encoder_id(spec)
    given = {"license": license, "language": language, "datasets": datasets}
    given = {key: value for key, value in given.items() if value}
    data = ModelCardData(
        base_model=base,
        eval_results=results or None,
        library_name="hf_unlearn",
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=(repo_id or f"filter-{names}").split("/")[-1],
        tags=all_tags(TAGS, ["diffusers"] if inside else [], tags),
        **inherited(said_of(base, token=token), given),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=line((repo_id or "").split("/")[-1]) or (f"{inside} without {names}" if inside else f"Filter: {names}"),
        paper=PAPER,
        names=names,
        seen=_seen(spec),
        encoder=_encoder(spec),
        concepts=[_shown(concept) for concept in concepts],
        inside=inside,
        alone=None if inside else _alone(name, spec, config.embedding_size),
        around=_whole(name, spec) if inside else _around(name, spec, pipeline_id),
        slot=_slot(name) if _sees_images(spec) and not inside else None,
        own=spec is not None and spec.get("kind") == "custom",
        has_encoder=spec is not None,
        hardware=hardware(),
        versions=", ".join(f"{name} {number}" for name, number in library_versions().items() if name in WITHIN),
    )
    return card.content.rstrip() + "\n"


def _shown(concept: Mapping[str, Any]) -> dict[str, Any]:
    figures, threshold = concept["figures"], concept["threshold"]
    rows = []
    for key, title in RATES.items():
        rate = figures.get(key)
        if rate is None:
            continue
        counted = "–" if rate.get("total") is None else f"{rate['count']:,} of {rate['total']:,}"
        given = rate["low"] == rate["high"]
        interval = "as given" if given else f"{100 * rate['low']:.1f} to {100 * rate['high']:.1f} %"
        origin = figures.get(f"{key}_from")
        rows.append((title, f"{100 * rate['value']:.1f} %", interval, counted + (f", {origin}" if origin else "")))
    if figures.get("auc") is not None:
        rows.append(("area under the ROC curve", f"{figures['auc']:.3f}", "–", "–"))
    return {
        "name": line(concept["name"]),
        "description": line(concept["description"]),
        "score": f"`{concept['score']}`: {SCORES.get(concept['score'], 'a score')}",
        "rule": threshold["rule"],
        "promise": threshold.get("promise"),
        "marks": None
        if not figures
        else f"{figures['undesired']:,} undesired and {figures['clean']:,} clean marks, {figures['unmarked']:,} unmarked samples",
        "rows": rows,
    }


def _measured(figures: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Of the figures, those that somebody's marks were counted for; in percent, but for the area."""
    found = [
        (key, RATES[key], 100 * figures[key]["value"])
        for key in ("recall", "false_alarm")
        if figures.get(key) is not None
    ]
    return found + (
        [("roc_auc", "area under the ROC curve", figures["auc"])] if figures.get("auc") is not None else []
    )


# The encoder


def _sees_images(spec: Mapping[str, Any] | None) -> bool:
    return spec is not None and spec.get("kind") != "text"


def _seen(spec: Mapping[str, Any] | None) -> str:
    if spec is None:
        return "the latents that a generator draws from"
    return "images" if _sees_images(spec) else "texts"


def encoder_id(spec: Mapping[str, Any] | None) -> str | None:
    """Where it is from the Hub: a folder's name has no owner."""
    spec = spec or {}
    name = (spec.get("reference") or {}).get("id") or spec.get("name") or ""
    return hub_id(name) if "/" in name and spec.get("kind") != "custom" else None


def _encoder(spec: Mapping[str, Any] | None) -> str:
    if spec is None:
        return "none: the generator's latents are judged as they are"
    known = encoder_id(spec)
    name = f"[{known}](https://huggingface.co/{known})" if known else f"`{line(spec.get('name') or '')}`"
    if spec.get("kind") == "custom":
        return f"{name}, the user's own, which is not stored here"
    reference = spec.get("reference")
    if reference is None:
        return f"{name}, stored here"
    return f"{name}, revision `{reference['revision']}`, not stored here: loaded from there, and refused if its weights differ"


# Code


def _alone(name: str, spec: Mapping[str, Any] | None, size: int) -> str:
    own = spec is not None and spec.get("kind") == "custom"
    imports, encoder = "FASTSafetyChecker", ""
    if own:
        imports, encoder = (
            "FASTSafetyChecker, FilterEncoder",
            f", encoder={_own(spec)}",
        )
    lines = [f"from hf_unlearn import {imports}", ""]
    if own:
        lines += ["# encode: the module or function that it was fitted with"]
    lines += [f"checker = FASTSafetyChecker.from_pretrained({json.dumps(name)}{encoder})"]
    if spec is None:
        lines = ["import torch", *lines, f"output = checker(torch.randn(4, {size}))  # your generator's latents"]
    elif _sees_images(spec):
        channels = (spec.get("preprocessing") or {}).get("channels")
        mode = "L" if channels == 1 else "RGB"
        lines = [
            "from PIL import Image",
            *lines,
            f'output = checker([Image.new("{mode}", (64, 64))])  # your images, of any size',
        ]
    else:
        lines.append('output = checker(["a text"])')
    return "\n".join([*lines, "output.flags, output.scores  # True: not released"])


def _own(spec: Mapping[str, Any]) -> str:
    """The encoder of the user's own, with the settings that it was fitted with."""
    prepared = spec.get("preprocessing") or {}
    arguments = {"name": spec["name"], "size": prepared.get("size"), "channels": prepared.get("channels")}
    arguments = {key: value for key, value in arguments.items() if value is not None}
    arguments |= {"normalize": True} if spec.get("normalize") else {}
    shown = [f"{key}={tuple(value) if isinstance(value, list) else value!r}" for key, value in arguments.items()]
    return f"FilterEncoder.own(encode, {', '.join(shown)})".replace("'", '"')


def _around(name: str, spec: Mapping[str, Any] | None, pipeline_id: str | None) -> str | None:
    if spec is not None and (not _sees_images(spec) or spec.get("kind") == "custom"):
        return None
    pipeline = json.dumps(pipeline_id or "folder or id of a pipeline")
    return "\n".join(
        [
            "from hf_unlearn import FilteredPipeline",
            "",
            f'pipe = FilteredPipeline.from_pretrained({pipeline}, filter={json.dumps(name)}, action="regenerate")',
            "# called like the pipeline inside; its output has .filtered and .filter_scores besides",
            'pipe.save_pretrained("filtered")  # loads with FilteredPipeline only',
        ]
    )


def _whole(name: str, spec: Mapping[str, Any] | None) -> str:
    """Of a pipeline that is saved with its filter."""
    own = spec is not None and spec.get("kind") == "custom"
    encoder = f", filter_encoder={_own(spec)}" if own else ""
    lines = [f"from hf_unlearn import {'FilteredPipeline, FilterEncoder' if own else 'FilteredPipeline'}", ""]
    if own:
        lines.append("# encode: the module or function that the filter was fitted with")
    lines.append(f"pipe = FilteredPipeline.from_pretrained({json.dumps(name)}{encoder})")
    return "\n".join(
        [*lines, "# called like the pipeline inside; its output has .filtered and .filter_scores besides"]
    )


def _slot(name: str) -> str:
    return "\n".join(
        [
            "from diffusers import StableDiffusionPipeline",
            "from hf_unlearn import FASTSafetyChecker",
            "from transformers import CLIPImageProcessor",
            "",
            "pipe = StableDiffusionPipeline.from_pretrained(",
            '    "folder or id of a pipeline",',
            f"    safety_checker=FASTSafetyChecker.from_pretrained({json.dumps(name)}),",
            "    feature_extractor=CLIPImageProcessor(),  # the pipeline wants one; the filter prepares images itself",
            ")",
        ]
    )
