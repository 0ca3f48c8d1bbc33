"""A generator that is audited: what it draws, and what its draws show. Every look is taken once; the pipeline stays as it is."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...modes import in_eval_mode
from ..audited import AuditedModel
from .data import Asked, GeneratorData
from .marker import Marker


AT_ONCE = 2**20  # pixels that are drawn together
PARTS = ("unet", "transformer", "generator")  # of a pipeline, that make the image


@dataclass(frozen=True)
class Look:
    """What draws show.

    Attributes:
        kind (`Tensor`): `[n]`, bool: which show the forgotten kind.
        classes (`Tensor`, *optional*): `[n]`, by a marker that gives class numbers.
        features (`Tensor`): `[n, width]`, and `extractor` (`str`), what made them.
    """

    kind: Tensor
    classes: Tensor | None
    features: Tensor
    extractor: str


class GeneratorSubject(AuditedModel):
    """A pipeline."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def is_prompted(self) -> bool:
        return is_prompted(self.model)

    @property
    def part(self) -> str:
        """The pipeline's name of what makes the image."""
        return part_of(self.model)

    @property
    def lacks(self) -> dict[str, str]:
        """What cannot be done with it, and why."""
        pipe, kind = self.model, type(self.model).__name__
        found = {
            name: f"{kind} takes no {name}" for name in ("guidance_scale", "negative_prompt") if not takes(pipe, name)
        }
        if type(pipe) is stock_class(pipe):
            found["wrapper"] = f"{kind} is a stock pipeline already"
        schedule = type(getattr(pipe, "scheduler", None)).__name__
        if is_gan(pipe):
            found |= dict.fromkeys(("denoiser", "sampler"), f"{kind} has no denoiser")
            if getattr(pipe, "discriminator", None) is None:
                found["training"] = f"{kind} comes without its discriminator"
        elif not isinstance(getattr(pipe.scheduler, "alphas_cumprod", None), Tensor):
            found["sampler"] = f"no other sampler draws by the noise of {schedule}"
            if not schedule.startswith("FlowMatch"):
                found["training"] = f"the noise of {schedule} is not trained with here"
        encoders = [name for name in pipe.components if name.startswith("text_encoder")]
        if len(encoders) != 1 or part_of(pipe) != "unet":
            found["embedding"] = f"{kind} is not of Stable Diffusion 1 or 2, whose words are searched"
        return found

    @cached_property
    def pipe(self) -> Any:
        """The pipeline without a progress bar and with a scheduler of its own; the same weights."""
        return quiet(self.model)

    def copy(self, *more: str) -> Any:
        """A pipeline of its own to attack, in eval mode: what makes the image is a copy, and `more` parts; the others are shared."""
        attacked = quiet(self.model)
        for name in (self.part, *more):
            attacked.register_modules(**{name: copy.deepcopy(getattr(self.model, name)).eval()})
        return attacked

    def takes(self, argument: str) -> bool:
        """Whether its call has such a keyword."""
        return takes(self.model, argument) is not None

    def draw(self, asked: Asked, drawing: Mapping[str, Any]) -> Tensor:
        return draw(self.pipe, asked, drawing)

    def look(self, asked: Asked, marker: Marker, drawing: Mapping[str, Any]) -> Look:
        return self.once(asked, lambda: look_at(self.pipe, asked, marker, drawing))


def is_gan(pipe: Any) -> bool:
    return hasattr(pipe, "generator") and hasattr(pipe, "draw")


def is_prompted(pipe: Any) -> bool:
    return any(name.startswith("tokenizer") for name in pipe.components)


def part_of(pipe: Any) -> str:
    return next(name for name in PARTS if getattr(pipe, name, None) is not None)


def quiet(pipe: Any) -> Any:
    """The same pipeline, of the same parts, that shows no progress and keeps its scheduler's state to itself."""
    other = copy.copy(pipe)
    other.set_progress_bar_config(disable=True)
    if getattr(pipe, "scheduler", None) is not None:
        other.register_modules(scheduler=copy.deepcopy(pipe.scheduler))
    return other


def stock_class(pipe: Any) -> type:
    """The class of a pipeline, or of a class of one's own the one of diffusers (or of this package) that it derives from."""
    return next(kind for kind in type(pipe).__mro__ if kind.__module__.startswith(("diffusers.", "hf_unlearn.")))


def of_stock_class(pipe: Any) -> Any:
    """The same parts, as the stock class draws with them."""
    plain = copy.copy(pipe)
    plain.__class__ = stock_class(pipe)
    return plain


@contextmanager
def in_eval(pipe: Any) -> Iterator[None]:
    """All parts of a pipeline in eval mode, and afterwards as before."""
    with ExitStack() as stack:
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                stack.enter_context(in_eval_mode(part))
        yield


def generators_of(seeds: tuple[int, ...]) -> list[torch.Generator]:
    """On the CPU, so that every device begins from the same noise."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def steps_of(pipe: Any, drawing: Mapping[str, Any]) -> dict[str, int]:
    """The pipeline's own number of denoising steps, as far as its scheduler has them, where none is given."""
    taken = takes(pipe, "num_inference_steps")
    if "num_inference_steps" in drawing or taken is None:
        return {}
    return {"num_inference_steps": min(taken.default, pipe.scheduler.config.num_train_timesteps)}


def takes(pipe: Any, argument: str) -> inspect.Parameter | None:
    """The parameter of that name of a pipeline's call, or of the call that it derives from."""
    calls = (vars(kind)["__call__"] for kind in type(pipe).__mro__ if "__call__" in vars(kind))
    return next((found for call in calls if (found := inspect.signature(call).parameters.get(argument))), None)


@torch.no_grad()
def batches(pipe: Any, asked: Asked, drawing: Mapping[str, Any], **given: Any) -> Iterator[Tensor]:
    """Images of what is asked for, by the pipeline's own call, some at a time. Image i is a function of the weights, its seed and its prompt.

    Args:
        drawing (`dict`): keyword arguments of the call.
        given: more of them, with a row for each of `asked` where they are tensors or lists; they stand above `drawing`.

    Yields:
        `Tensor`: `[n, channels, height, width]` in [−1, 1], fp32, on the CPU.

    Raises:
        ValueError: images that are not finite.
    """
    counted, size = "num_images" if is_gan(pipe) else "batch_size", at_once(pipe, drawing)
    options = steps_of(pipe, drawing) | dict(drawing)
    with in_eval(pipe):
        for begin in range(0, len(asked), size):
            rows = slice(begin, begin + size)
            some = asked[rows]
            what = {counted: len(some)} if some.prompts is None else {"prompt": list(some.prompts)}
            more = {name: value[rows] if isinstance(value, Tensor | list) else value for name, value in given.items()}
            images = pipe(**(what | options | more), generator=generators_of(some.seeds), output_type="pt").images
            images = images.float().cpu() * 2 - 1
            if not images.isfinite().all():
                raise ValueError("what the model gave is not finite")
            yield images.clamp(-1, 1)


def at_once(pipe: Any, drawing: Mapping[str, Any]) -> int:
    """Images that are drawn together."""
    config = getattr(pipe, part_of(pipe)).config
    size = getattr(pipe, "default_sample_size", None) or config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    scale = getattr(pipe, "vae_scale_factor", 1)
    height, width = drawing.get("height", scale * height), drawing.get("width", scale * width)
    return max(1, min(64, AT_ONCE // (3 * height * width)))


def draw(pipe: Any, asked: Asked, drawing: Mapping[str, Any], **given: Any) -> Tensor:
    """All of [`batches`] in one."""
    return torch.cat(list(batches(pipe, asked, drawing, **given)))


def look_at(pipe: Any, asked: Asked, marker: Marker, drawing: Mapping[str, Any], **given: Any) -> Look:
    """What a pipeline's draws show."""
    kinds, classes, features = [], [], []
    for images in batches(pipe, asked, drawing, **given):
        kind, named = marker(images)
        seen = marker.features(images)
        kinds.append(kind)
        classes.append(named)
        features.append(seen.values)
    named = None if classes[0] is None else torch.cat(classes)
    return Look(torch.cat(kinds), named, torch.cat(features), seen.extractor)


def marks(pipe: Any, asked: Asked, data: GeneratorData, **given: Any) -> Tensor:
    """`[n]`, bool: which draws of a pipeline, perhaps an attacked one, show the forgotten kind."""
    return torch.cat([data.marker(images)[0] for images in batches(pipe, asked, data.drawing, **given)])


def pace(subject: GeneratorSubject, data: GeneratorData) -> float:
    """Seconds that it takes to draw an image and to see what it shows, measured on a batch."""
    some = data.asked[: at_once(subject.model, data.drawing)]
    look_at(subject.pipe, some, data.marker, data.drawing)  # the first one takes longer
    started = time.perf_counter()
    look_at(subject.pipe, some, data.marker, data.drawing)
    return (time.perf_counter() - started) / len(some)
