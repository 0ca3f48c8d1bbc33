"""The keys of a recipe of `hf-unlearn unlearn --method redirect`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ...examples.named import TEXT_TO_IMAGE
from ...training.checks import SEEDS, check_fields, check_is_not_original
from .checks import check_device, check_small


@dataclass
class RedirectJob:
    """Redirects a concept of a text-to-image pipeline in closed form: it is asked for in vain, nothing is trained, and no image is needed.

    Args:
        method (`"redirect"`): this.
        model (`str`): `"coloured-digits"` (a small pipeline, trained on first use: about 40 minutes), a folder, or an id on the Hub: Stable
            Diffusion 1, 2, 3 or XL, PixArt, Flux.1, a latent consistency model.
        model_revision (`str`, *optional*): of a pipeline on the Hub.
        concept (`list[str]`): the words or phrases to forget.
        anchor (`list[str]`, *optional*): what is drawn instead: one for all, or one for each. Default: other words of the same kind, told.
        wordings (`list[str]`, *optional*): ways to ask for it: templates with `{}`, or whole prompts that name it. Default: a dozen templates.
        keep (`list[str]`, *optional*): prompts to keep, or one `.safetensors` file of their moments. Default: a thousand of our own.
        strength, keep_weight, ridge, null_space (*optional*): see [`redirect_concept`].
        lora_rank (`int`, *optional*): write a LoRA of this rank instead of a pipeline.
        prompts (`list[str]`, *optional*): what else is drawn before and after, for the picture. Default: the first of the kept ones.
        grid_images (`int`, defaults to 8): images of wordings, and as many of `prompts`, in the picture; 0 for none.
        num_inference_steps, guidance_scale (*optional*): of the images. Default: the pipeline's own.
        batch_size (`int`, defaults to 16): prompts encoded and images drawn at a time.
        device (`str`, *optional*): as in `"cuda"`. Default: a GPU, if there is one.
        dtype (`"float16"` | `"bfloat16"`, *optional*): of the weights. Default: float32.
        seed (`int`, defaults to 0): of the images.
        output_dir (`str`): gets the pipeline, or the LoRA, with its card.

    Raises:
        ValueError: a key that is missing, or a value that is not allowed.
    """

    _argument_group_name = "model and concept"
    method: str | None = None
    model: str | None = None
    model_revision: str | None = None
    concept: list[str] | None = None
    anchor: list[str] | None = None
    wordings: list[str] | None = None
    keep: list[str] | None = None
    strength: float = 1.0
    keep_weight: float = 5.0
    ridge: float = 1e-4
    null_space: bool = False
    lora_rank: int | None = None
    prompts: list[str] | None = None
    grid_images: int = 8
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 16
    device: str | None = None
    dtype: Literal["float16", "bfloat16"] | None = None
    seed: int = 0
    output_dir: str | None = None

    def __post_init__(self):
        if not self.model:
            raise ValueError("model: missing; set it to 'coloured-digits', a folder, or an id on the Hub")
        check_small(self, "model", tuple(TEXT_TO_IMAGE))
        if not self.concept:
            raise ValueError("concept: missing; name the word or phrase to forget")
        if not self.output_dir:
            raise ValueError("output_dir: missing; set it to the folder that gets the pipeline")
        ranges = {"≥ 1": ("lora_rank", "num_inference_steps", "batch_size"), "> 0": ("strength", "ridge")}
        check_fields(self, ranges | {"≥ 0": ("keep_weight", "grid_images"), SEEDS: ("seed",)})
        check_device(self.device)
        check_is_not_original(self.output_dir, self.model)

    def settings(self) -> dict[str, Any]:
        """Arguments of [`ConceptRedirection.of`]."""
        anchor, keep = self.anchor, self.keep
        return {
            "anchor": anchor[0] if anchor is not None and len(anchor) == 1 else anchor,
            "keep": keep[0] if keep is not None and len(keep) == 1 and keep[0].endswith(".safetensors") else keep,
            "wordings": self.wordings,
            "keep_weight": self.keep_weight,
            "ridge": self.ridge,
            "null_space": self.null_space,
            "batch_size": self.batch_size,
        }
