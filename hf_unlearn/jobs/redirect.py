"""The job of `hf-unlearn unlearn --method redirect`: words lead elsewhere, in closed form, and a picture and a card say so."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline

from ..examples.named import TEXT_TO_IMAGE, made
from ..files import PRIVATE, kept_private, loading
from ..hub.allowed import CARD, LORA, publishable_files
from ..hub.card import Figure, unlearning_card
from ..hub.loading import diffusion_task, loading_code
from ..hub.origin import hub_id, inherited, keep_origins, origin, revision_of, said_of
from ..hub.provenance import Provenance
from ..hub.publish import forget_local_paths
from ..hub.record import earlier_of, record_of, write_record
from ..plots import image_grid
from ..unlearning.diffusion.drawing import generate
from ..unlearning.diffusion.prompt_effect import LASTING, still_drawn
from ..unlearning.diffusion.redirect import KIN, ConceptRedirection
from ..unlearning.diffusion.wordings import kept_prompts
from .keys import check_machine, console, device_of, show_code


if TYPE_CHECKING:
    from .recipe.redirect import RedirectJob


def run_redirect(job: RedirectJob) -> dict[str, Any]:
    """Find the redirection, draw, apply it, draw again, save, and say what is left of the concept's effect.

    Raises:
        ValueError: something in the recipe does not fit the pipeline; nothing was written.
    """
    check_machine(job, "method: redirect")
    pipe = _pipeline(job)
    redirection = ConceptRedirection.of(pipe, job.concept, **job.settings())
    effect = redirection.effect(pipe)
    prompts = _shown(job, redirection)
    before = _drawn(pipe, prompts, job)
    folder = Path(job.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if job.lora_rank is None:
        redirection.apply(pipe, job.strength)
        pipe.save_pretrained(folder)
        forget_local_paths(folder)
    else:
        redirection.save_lora(pipe, folder, job.lora_rank, job.strength)
        pipe.load_lora_weights(folder, weight_name=LORA)
        pipe.fuse_lora()  # what is measured are plain weights
        pipe.unload_lora_weights()
    left = effect.remaining(pipe)
    _write_pictures(folder, prompts, before, _drawn(pipe, prompts, job))
    card, provenance = _card(job, pipe, redirection, effect.guidance, left)
    card.save(folder / CARD)
    chain = earlier_of(provenance.base_model, provenance.base_revision)
    write_record(record_of(provenance, chain), folder, publishable_files(folder))
    out = console()
    for concept, anchor in redirection.anchors.items():
        out.print(f"{concept} is now answered as {anchor}")
    out.print(f"effect of its wordings, times guidance: {effect.guidance:.3g} before, {left:.3g} after")
    if drawn := still_drawn(left, "wordings"):
        out.print(f"not passed  {drawn}.")
    places = {"pipeline" if job.lora_rank is None else "LoRA": folder, "card": folder / "README.md"}
    for name, place in (places | {"pictures": folder / PRIVATE / "samples"} if prompts else places).items():
        out.print(f"{name:9} {place}")
    out.print("\nLoad it:\n")
    show_code(_code(job, pipe, str(folder)).splitlines())
    return {
        "figures": {"prompt_effect": {"before": effect.guidance, "after": left}},
        "verdict": "not passed" if drawn else "passed",
        "failed_checks": [drawn] if drawn else [],
        "anchors": redirection.anchors,
        "places": places,
    }


def _pipeline(job: RedirectJob) -> DiffusionPipeline:
    name = str(made(job.model)) if job.model in TEXT_TO_IMAGE else job.model
    given = {"revision": job.model_revision, "torch_dtype": job.dtype and getattr(torch, job.dtype)}
    with loading("model", job.model, "a pipeline"):
        pipe = DiffusionPipeline.from_pretrained(name, **{key: value for key, value in given.items() if value})
    keep_origins(pipe)
    return pipe.to(device_of(job))


# Pictures


def _shown(job: RedirectJob, redirection: ConceptRedirection) -> list[str]:
    """Wordings of the concept, then what is kept, `grid_images` of each."""
    asked = [prompt for prompt, _ in redirection.pairs]
    kept = job.prompts or (job.keep if job.keep and not job.keep[0].endswith(".safetensors") else None)
    kept = kept or kept_prompts(redirection.anchors)
    return [prompts[i % len(prompts)] for prompts in (asked, kept) for i in range(job.grid_images)]


def _drawn(pipe: DiffusionPipeline, prompts: list[str], job: RedirectJob) -> list[Any]:
    """An image of each prompt, each from noise of its own, which is the same before and after."""
    if not prompts:
        return []
    given = {name: getattr(job, name) for name in ("seed", "num_inference_steps", "guidance_scale", "batch_size")}
    return list((generate(pipe, prompts, **given).permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1).numpy())


def _write_pictures(folder: Path, prompts: list[str], before: list[Any], after: list[Any]) -> None:
    """Both in `_private/`: prompts stand below the images, and say what was forgotten."""
    for name, images in (("before", before), ("after", after)) if prompts else ():
        with kept_private(folder / PRIVATE / "samples" / f"{name}.png") as file:
            image_grid(images, [_lines(prompt) for prompt in prompts], file, columns=len(prompts) // 2)


def _lines(prompt: str, width: int = 16) -> str:
    return "\n".join(textwrap.wrap(prompt, width)[:3])


# The card


def _card(job: RedirectJob, pipe: DiffusionPipeline, redirection: ConceptRedirection, before: float, left: float):
    base = origin(pipe.config.get("_name_or_path") or job.model)
    count, drawn = len(redirection.anchors), still_drawn(left, "wordings")
    chosen = {
        "strength": job.strength,
        "keep_weight": job.keep_weight,
        "ridge": job.ridge,
        "null_space": job.null_space,
    }
    provenance = Provenance(
        method="redirect",
        method_title="Redirection of a concept in closed form",
        forgotten=f"{count} concept{'s' * (count > 1)}, asked for in {len(redirection.pairs)} wordings",
        forget_examples=len(redirection.pairs),
        stands_on=KIN,
        base_model=base,
        base_revision=revision_of(base),
        hyperparameters=chosen | ({} if job.lora_rank is None else {"lora_rank": job.lora_rank}),
        seed=job.seed,
        steps=0,
    )
    figure = Figure(
        metric="prompt_effect",
        name="Effect of the concept's wordings, times guidance",
        before=before,
        after=left,
        split="wordings",
        unit="",
    )
    card = unlearning_card(
        provenance,
        **inherited(said_of(base, revision_of(base)), {}),
        model_name=Path(job.output_dir).resolve().name,
        library_name="diffusers",
        pipeline_tag=diffusion_task(type(pipe)),
        base_model_relation="finetune" if job.lora_rank is None else "adapter",
        results=[figure],
        failed_checks=[f"{drawn}."] if drawn else [],
        passed_checks=[]
        if drawn
        else [f"The wordings have {left:.2g} times the effect of a prompt without guidance, at most {LASTING:g}."],
        limitations=[
            "Words no longer lead to the concept; the denoiser can still draw it, without a prompt, from an image, or from an embedding that is "
            "searched for."
        ],
        load_snippet=_code(job, pipe, Path(job.output_dir).resolve().name),
    )
    return card, provenance


def _code(job: RedirectJob, pipe: DiffusionPipeline, name: str) -> str:
    steps = {} if job.num_inference_steps is None else {"num_inference_steps": job.num_inference_steps}
    lora = {} if job.lora_rank is None else {"lora_base": hub_id(job.model) or "the original"}
    return loading_code(type(pipe), name, **steps, **lora)
