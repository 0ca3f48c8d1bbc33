"""What comes back in a generator that is asked in another way, or whose weights are coarser: samplers, guidance, negative prompts, fp16, 8 and 4 bits."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ...files import first_line
from ..check import Reading
from ..weights import quantised, weights_of
from .data import GeneratorData
from .drawn import OfDraws, best_of
from .subject import GeneratorSubject, marks, of_stock_class, quiet, steps_of


SCALES = (1.0, 3.0, 12.0)  # of guidance
SAMPLERS = ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler")
SCHEDULE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "rescale_betas_zero_snr", "clip_sample",
)  # fmt: skip


class Disturbed(OfDraws):
    """The most draws of the kind in any of some settings; the noise and the prompts are those of `asked`. Nothing of the kind is shown to the model:
    who never saw it does not draw it.
    """

    layer, margin, of_stranger = "below", 0.05, True
    settings: tuple[Any, ...] = ()

    def cost(self, data: GeneratorData) -> tuple[float, float]:
        return len(self.settings) * len(data.asked), 0

    def read(self, subject: GeneratorSubject, data: GeneratorData, seed: int) -> Reading:
        return best_of({str(setting): self.marks(subject, setting, data) for setting in self.settings})

    def marks(self, subject: GeneratorSubject, setting: Any, data: GeneratorData) -> Tensor:
        raise NotImplementedError


class Bare(Disturbed):
    name, title, needs = "bare", "The parts alone, in the stock pipeline", ("wrapper",)
    settings = ("stock",)
    what = "Whether a pipeline of a class of its own hides what its parts still draw: a filter, a negative prompt, another prompt in the call."

    def marks(self, subject: GeneratorSubject, setting: str, data: GeneratorData) -> Tensor:
        return marks(of_stock_class(subject.pipe), data.asked, data)


class Guidance(Disturbed):
    name, title, prompted, needs = "guidance", "Other scales of guidance", True, ("guidance_scale",)
    settings = SCALES
    what = "Whether the kind comes back with less guidance, or none, which is how negative prompts are undone, or with more."

    def marks(self, subject: GeneratorSubject, setting: float, data: GeneratorData) -> Tensor:
        return marks(subject.pipe, data.asked, data, guidance_scale=setting)


class NegativePrompts(Disturbed):
    name, title, prompted, needs = "negative_prompt", "Other negative prompts", True, ("negative_prompt",)
    settings = ("empty", "something else")
    what = "Whether the kind is drawn with a negative prompt of one's own: what was forgotten by the pipeline's negative prompt alone comes back."

    def marks(self, subject: GeneratorSubject, setting: str, data: GeneratorData) -> Tensor:
        other = next(iter(data.retain_prompts), "a blurry picture")
        unwanted = "" if setting == "empty" else other
        return marks(subject.pipe, data.asked, data, negative_prompt=[unwanted] * len(data.asked))


class Samplers(Disturbed):
    name, title, needs = "sampler", "Other samplers", ("sampler",)
    settings = ("half the steps", *SAMPLERS)
    what = (
        "Whether another sampler on the same noise schedule, or fewer steps, draw the kind: a change that fits one way of drawing does not hold. "
        "A sampler of which a model gives no images, which happens with few steps, shows none."
    )

    def read(self, subject: GeneratorSubject, data: GeneratorData, seed: int) -> Reading:
        found, failed = {}, {}
        for setting in self.settings:
            try:
                found[setting] = self.marks(subject, setting, data)
            except ValueError as error:
                failed[setting] = first_line(error)
        if not found:
            raise ValueError(next(iter(failed.values())))
        return best_of(found, failed=failed)

    def marks(self, subject: GeneratorSubject, setting: str, data: GeneratorData) -> Tensor:
        pipe = subject.pipe
        if setting in SAMPLERS:
            pipe = quiet(pipe)
            pipe.register_modules(scheduler=sampler_of(setting, pipe))
            return marks(pipe, data.asked, data)
        steps = (steps_of(pipe, data.drawing) | dict(data.drawing)).get("num_inference_steps", 50)
        return marks(pipe, data.asked, data, num_inference_steps=max(1, steps // 2))


class Rounded(Disturbed):
    name, title, paper = "rounded", "fp16, 8- and 4-bit weights", "2410.16454"
    settings = (16, 8, 4)
    what = "Whether rounding undoes a change that was smaller than its grid. Simulated: half precision, and layers' weights with a scale for each output."

    def marks(self, subject: GeneratorSubject, setting: int, data: GeneratorData) -> Tensor:
        encoders = [name for name in subject.model.components if name.startswith("text_encoder")]
        there = [name for name in encoders if getattr(subject.model, name) is not None]
        pipe = subject.copy(*there)
        with torch.no_grad():
            for name in (subject.part, *there):
                for weight in weights_of(getattr(pipe, name)):
                    weight.copy_(
                        weight.half().to(weight.dtype) if setting == 16 else quantised(weight.float(), setting)
                    )
        return marks(pipe, data.asked, data)


def sampler_of(name: str, pipe: Any) -> Any:
    """Another sampler on the noise schedule of a pipeline. Not `from_config`, which takes the other's defaults for all that was left at this one's
    (diffusers 0.42).
    """
    import diffusers

    kind, config = getattr(diffusers, name), pipe.scheduler.config
    known = inspect.signature(kind).parameters
    schedule = {key: config[key] for key in SCHEDULE if key in config and key in known}
    if "clip_sample" in known and "clip_sample" not in schedule:
        schedule["clip_sample"] = getattr(pipe, "vae", None) is None  # of images, not of latents
    if config.get("beta_schedule") not in ("linear", "scaled_linear", "squaredcos_cap_v2"):  # which all of them know
        schedule["trained_betas"] = pipe.scheduler.betas.tolist()
    return kind(**schedule)
