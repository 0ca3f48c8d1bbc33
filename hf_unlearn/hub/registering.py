"""The one place that knows diffusers' private table of libraries."""

from __future__ import annotations

from diffusers.pipelines import pipeline_loading_utils


def register_with_diffusers(*components: str) -> None:
    """Let `model_index.json` name classes that `hf_unlearn` exports as `["hf_unlearn", "DCGANGenerator"]`.

    diffusers 0.42 writes the full module path of a class that it does not know, and then loads it only if that very module
    has been imported, from the Hub never.
    """
    methods = {name: ["save_pretrained", "from_pretrained"] for name in components}
    pipeline_loading_utils.LOADABLE_CLASSES.setdefault("hf_unlearn", {}).update(methods)
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(methods)
