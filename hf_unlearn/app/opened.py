"""What the app was asked to open: one pipeline or two, a filter, or both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..examples.named import DDPMS, GANS, TEXT_TO_IMAGE, made
from ..files import loading
from ..filtering.checker import FASTSafetyChecker
from ..filtering.drawing import saved
from ..filtering.drawing.pipeline import FilteredPipeline
from ..gan.pipeline import GANPipeline
from ..hub.loading import diffusion_task
from ..hub.origin import hub_id
from ..jobs.keys import check_machine, device_of
from ..jobs.recipe.filter import holds_a_filter


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..jobs.recipe.app import AppJob

SMALL = (*GANS, *DDPMS, *TEXT_TO_IMAGE)
DEFAULT = ["digits-gan"]
ENCODERS = {name: "digits" for name in SMALL if "digits" in name}  # what sees the images of a small model
PROMPTS = ["a red 3", "a green 7", "a blue 0", "a yellow 5"]  # of the small text-to-image pipelines


@dataclass(frozen=True)
class Opened:
    """What is shown.

    Args:
        names (tuple of `str`): as the user named them: what draws before the one that changes it.
        pipeline ([`~diffusers.DiffusionPipeline`], *optional*): draws "before"; None where there is a filter alone.
        folder (`str`, *optional*): or id of it.
        checker ([`FASTSafetyChecker`], *optional*): a filter.
        action (`str`): what its pipeline was saved to do with what is blocked.
        unlearned ([`~diffusers.DiffusionPipeline`], *optional*): draws "after".
        encoder (`str`, *optional*): proposed for a new filter.
        prompts (`list[str]`): proposed; empty where the pipeline takes none.
    """

    names: tuple[str, ...]
    pipeline: DiffusionPipeline | None = None
    folder: str | None = None
    checker: FASTSafetyChecker | None = None
    action: str = "blank"
    unlearned: DiffusionPipeline | None = None
    encoder: str | None = None
    prompts: tuple[str, ...] = ()

    @property
    def prompted(self) -> bool:
        return self.pipeline is not None and diffusion_task(type(self.pipeline)) == "text-to-image"

    @property
    def has_latents(self) -> bool:
        return isinstance(self.pipeline, GANPipeline)

    @property
    def public(self) -> str | None:
        """Id of the pipeline on the Hub, for a card."""
        return None if self.names[0] in SMALL else hub_id(self.folder)


def opened(job: AppJob) -> Opened:
    """Load what a job names; small models are trained on first use.

    Raises:
        ValueError: something is not there, or the two do not belong together.
    """
    check_machine(job, "app")
    words = job.open or DEFAULT
    found = [(word, *_looked_up(word)) for word in words]
    found.sort(key=lambda entry: entry[1] == "filter")  # an original stays before what it became
    kinds = [kind for _, kind, _, _ in found]
    if len(found) == 2 and (kinds[0] == "filter" or "filtered" in kinds):
        pair = " and ".join(
            f"{word} (a {kind.replace('filtered', 'pipeline with its filter')})" for word, kind, _, _ in found
        )
        raise ValueError(
            f"open: {pair} do not go together; give a pipeline and a filter, an original and its unlearned pipeline, or one alone"
        )
    given = {"names": tuple(word for word, *_ in found)}
    place = next((folder for _, kind, folder, _ in found if kind != "filter"), None)
    for word, kind, folder, index in found:
        if kind == "filter":
            with loading("open", word, "a pipeline or a filter"):
                given["checker"] = FASTSafetyChecker.from_pretrained(folder).to(device_of(job))
        elif kind == "filtered":
            with loading("open", word, "a filtered pipeline"):
                whole = FilteredPipeline.from_pretrained(folder, **_dtype(job)).to(device_of(job))
            given |= {"pipeline": whole.pipeline, "checker": whole.safety_checker, "action": whole.action}
        else:
            with loading("open", word, "a pipeline"):
                given["unlearned" if "pipeline" in given else "pipeline"] = saved.load_plain(
                    folder, index, **_dtype(job)
                ).to(device_of(job))
    encoder = job.encoder or ENCODERS.get(words[0])
    result = Opened(**given, folder=place, encoder=encoder)
    _check(result)
    prompts = tuple(job.prompts or (PROMPTS if words[0] in TEXT_TO_IMAGE else ["a photo"]))
    if job.prompts and not result.prompted:
        raise ValueError(f"prompts: {result.names[0]!r} takes none; leave it out")
    return Opened(**given, folder=place, encoder=encoder, prompts=prompts if result.prompted else ())


def _dtype(job: AppJob) -> dict[str, Any]:
    return {} if job.dtype is None else {"dtype": getattr(torch, job.dtype)}


def _looked_up(word: str) -> tuple[str, str, dict[str, Any]]:
    """What a word names (`"filter"`, `"filtered"` or `"pipeline"`), where it is, and its index."""
    if holds_a_filter(Path(word)):
        return "filter", word, {}
    folder = str(made(word)) if word in SMALL else word
    try:
        with loading("open", word, "a pipeline or a filter"):
            index = saved.fetch(folder)[0]
    except ValueError:
        if Path(word).exists() or hub_id(word) is None:
            raise
        return "filter", word, {}  # on the Hub, if anywhere: loading says
    return "filtered" if saved.is_filtered(index) else "pipeline", folder, index


def _check(found: Opened) -> None:
    for pipeline in (found.pipeline, found.unlearned):
        if pipeline is not None and diffusion_task(type(pipeline)) is None:
            raise ValueError(f"open: {type(pipeline).__name__} needs more than a prompt, which the app does not have")
    if found.unlearned is not None and diffusion_task(type(found.unlearned)) != diffusion_task(type(found.pipeline)):
        raise ValueError(
            f"open: {found.names[0]!r} and {found.names[1]!r} are not alike: one takes prompts, the other does not"
        )
    if found.checker is not None and getattr(found.checker.encoder, "kind", None) == "text":
        raise ValueError("open: the filter judges texts, and the app shows images")
    if found.checker is not None and found.checker.encoder is None and not found.has_latents:
        raise ValueError("open: the filter judges a GAN's latents; open it with that GAN")
