"""What the jobs of `hf-unlearn filter` share: the keys that say what draws, its samples, and the filter in a folder."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ...examples.named import made
from ...files import loading
from ...filtering.checker import FASTSafetyChecker
from ...filtering.drawing import saved
from ...filtering.drawing.formats import as_tensor, asked_for
from ...filtering.drawing.pipeline import FilteredPipeline
from ...gan.pipeline import GANPipeline
from ...hub.loading import diffusion_task
from ...modes import seeded_generator
from ..keys import device_of
from ..recipe.filter import SMALL, PipelineJob, holds_a_filter
from ..watching import watch


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


# What samples are for: of one seed, each purpose has its own.
SHEET_SAMPLES, UNMARKED, EVALUATION, RUN = range(4)
FIT_FIRST = "run hf-unlearn filter fit first, or set filter to a folder or an id"


def _loading(job: PipelineJob) -> dict[str, Any]:
    """Arguments of `from_pretrained`."""
    given = {"revision": job.pipeline_revision, "dtype": job.dtype and getattr(torch, job.dtype)}
    return {name: value for name, value in given.items() if value is not None}


# Pipelines


def named_pipeline(job: PipelineJob) -> tuple[str, dict[str, Any]]:
    """Folder or id of the pipeline, which is trained where it is one of ours and not there yet, and its index.

    Raises:
        ValueError: there is none.
    """
    name = job.pipeline
    if name in SMALL:
        name = str(made(name))
    with loading("pipeline", job.pipeline, "a pipeline"):
        return name, saved.fetch(name, revision=job.pipeline_revision)[0]


def plain_pipeline(job: PipelineJob) -> tuple[DiffusionPipeline, str]:
    """The pipeline, on its device, and its folder or id.

    Raises:
        ValueError: there is none, or it has a filter already.
    """
    name, index = named_pipeline(job)
    if saved.is_filtered(index):
        raise ValueError(f"pipeline={job.pipeline!r}: has a filter already; give the pipeline in its folder pipeline/")
    with loading("pipeline", job.pipeline, "a pipeline"):
        return saved.load_plain(name, index, **_loading(job)).to(device_of(job)), name


def filtered_pipeline(job: Any, **settings: Any) -> FilteredPipeline:
    """The pipeline with the filter that a job names: in `filter`, else in `output_dir`, unless it is saved with one.

    Args:
        job ([`PipelineJob`]): with `filter` and `filter_revision`.
        settings: `action` and `max_tries`, where they are given.

    Raises:
        ValueError: no pipeline, no filter, or two.
    """
    missing = None
    if not job.filter and not holds_a_filter(job.folder):
        missing = ValueError(f"filter: missing, and output_dir={job.output_dir!r} holds none; {FIT_FIRST}")
        if job.pipeline in SMALL:  # which have none of their own, and may take minutes to train
            raise missing
    name, index = named_pipeline(job)
    own = saved.is_filtered(index)
    if own and (job.filter or job.filter_revision):
        key = "filter" if job.filter else "filter_revision"
        raise ValueError(f"{key}: pipeline={job.pipeline!r} has its own filter; leave it out")
    if own:
        with loading("pipeline", job.pipeline, "a filtered pipeline"):
            return FilteredPipeline.from_pretrained(name, **settings, **_loading(job)).to(device_of(job))
    if missing is not None:
        raise missing
    source = {} if job.filter_revision is None else {"revision": job.filter_revision}
    with loading("filter", job.filter or job.output_dir, "a filter"):
        checker = FASTSafetyChecker.from_pretrained(job.filter or job.output_dir, **source)
    with loading("pipeline", job.pipeline, "a pipeline"):
        pipeline = saved.load_plain(name, index, **_loading(job))
    return FilteredPipeline(pipeline, checker, **settings).to(device_of(job))


# Samples


@dataclass(frozen=True)
class Batch:
    """Some samples.

    Args:
        numbers (`range`): which ones.
        images (`Tensor`): `[n, channels, height, width]` in [−1, 1], fp32, on the CPU; what a filter is shown.
        latents (`Tensor`, *optional*): `[n, …]`, of a GAN.
    """

    numbers: Sequence[int]
    images: Tensor
    latents: Tensor | None


class Source:
    """Samples of a pipeline: sample `i` for a purpose depends on pipeline, prompts, seed, purpose and `i` alone.

    Raises:
        ValueError: a pipeline that needs more than a prompt, or keys that it does not take.
    """

    def __init__(self, pipeline: DiffusionPipeline, job: PipelineJob):
        self.pipeline, self.job = pipeline, job
        self.takes = inspect.signature(pipeline.__call__).parameters
        kind, task = type(pipeline).__name__, diffusion_task(type(pipeline))
        if task is None:
            raise ValueError(
                f"pipeline={job.pipeline!r}: {kind} needs more than a prompt; use FilteredPipeline in Python"
            )
        self.prompted = task == "text-to-image"
        if self.prompted and not job.prompts:
            raise ValueError(f"prompts: missing; {kind} needs some, as in ['a photo of a dog', 'a city street']")
        if job.prompts and not self.prompted:
            raise ValueError(f"prompts: {kind} takes none; leave it out")
        for name in ("num_inference_steps", "guidance_scale"):
            if getattr(job, name) is not None and name not in self.takes:
                raise ValueError(f"{name}: {kind} takes none; leave it out")
        pipeline.set_progress_bar_config(disable=True)

    @property
    def has_latents(self) -> bool:
        return isinstance(self.pipeline, GANPipeline)

    def arguments(self, purpose: int, numbers: Sequence[int]) -> dict[str, Any]:
        """Of the call that draws these samples."""
        # On the CPU, so that every device begins from the same noise.
        given = {"generator": [seeded_generator("cpu", self.job.seed, purpose, number) for number in numbers]}
        for name in ("num_inference_steps", "guidance_scale"):
            if getattr(self.job, name) is not None:
                given[name] = getattr(self.job, name)
        if "num_inference_steps" in self.takes and "num_inference_steps" not in given:
            steps = self.pipeline.scheduler.config.get("num_train_timesteps")  # which the default may exceed
            default = self.takes["num_inference_steps"].default
            if isinstance(default, int) and steps is not None and default > steps:
                given["num_inference_steps"] = steps
        if self.prompted:
            return given | {"prompt": [self.job.prompts[number % len(self.job.prompts)] for number in numbers]}
        return given | {"num_images" if "num_images" in self.takes else "batch_size": len(numbers)}

    @torch.no_grad()
    def draw(self, purpose: int, numbers: Sequence[int]) -> Batch:
        """These samples, at once."""
        given, latents = self.arguments(purpose, numbers), None
        if self.has_latents:
            latents = self.pipeline.prepare_latents(len(numbers), given.pop("generator"))
            given["latents"] = latents
        output = self.pipeline(**given, output_type=asked_for(self.pipeline, "np"))
        images = as_tensor(output.images)[0].float().cpu()
        return Batch(numbers, (images * 2).sub_(1).clamp_(-1, 1), None if latents is None else latents.cpu())

    def batches(self, purpose: int, count: int, title: str) -> Iterator[Batch]:
        """Samples 0 to `count`, with a progress bar where somebody looks."""
        size = self.job.batch_size
        parts = [range(first, min(first + size, count)) for first in range(0, count, size)]
        quiet = not sys.stderr.isatty()
        drawn = range(len(parts))
        if (looks := watch()) is not None:  # what is marked is drawn whole
            drawn = looks.batches(title, len(parts), purpose == UNMARKED or not getattr(self.job, "marked", True))
        shown = {"console": Console(stderr=True), "transient": True, "disable": quiet}
        for number in track(drawn, title, total=len(parts), **shown):
            yield self.draw(purpose, parts[number])


# What a user reads
