"""Draws with any pipeline, and releases only what a filter lets through."""

from __future__ import annotations

import inspect
import logging
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from threading import Lock, RLock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from huggingface_hub.errors import HFValidationError
from torch import Tensor

from ...files import first_line
from ...hub.adapters import check_no_adapter
from ...hub.origin import hub_id, keep_origins, origin, origins_of
from ...hub.publish import forget_local_paths
from ...hub.superseded import superseded
from ..card import encoder_id, filter_card
from ..checker import FASTSafetyChecker
from ..pushing import FilterPushMixin
from . import saved
from .actions import Action, FilteredImageError, check_action, replaced
from .calls import Call
from .formats import as_tensor, asked_for, check_fields, check_output_type, content_of, converted, decoded
from .judging import forget_locals, judged, judged_shown
from .outputs import Drawn, as_tuple, with_verdict
from .wrapper import PipelineWrapper


if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

_OWN = ("pipeline", "safety_checker")
# A pipeline holds the state of a call: its scheduler's, a callback's. One lock for each, whatever filters are on it.
_LOCKS: WeakKeyDictionary[DiffusionPipeline, RLock] = WeakKeyDictionary()
_LOCK = Lock()


class FilteredPipeline(FilterPushMixin, PipelineWrapper):
    """A pipeline and a filter that judges every image before anyone sees it.

    ```python
    pipe = FilteredPipeline.from_pretrained("me/digits-gan", filter="me/no-sevens", action="regenerate")
    out = pipe(num_images=8, generator=torch.Generator().manual_seed(0))
    out.images, out.filtered, out.filter_scores
    pipe.save_pretrained("filtered")  # no class of diffusers loads this folder without its filter
    ```

    It is called like the pipeline inside, and gives what that gives, of a subclass of its output's class, with
    `filtered` (`list[bool]`: not released as drawn; with `"flag"`: would not have been), `filter_scores` (`Tensor`, fp32, `[n,
    concepts]`, of what was drawn last for this place) and `filter_tries` (`list[int]`, images drawn for this place).
    An image is released if all of its pixels are finite and the filter says so; a video if this holds for every frame, and its
    scores are those of the worst one. Other attributes are those of the pipeline inside, also where they are set. Calls from
    several threads wait for each other.

    This protects from accidents, not from someone who holds the weights: `pipe.pipeline` draws without the filter.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): draws images or videos.
        safety_checker ([`FASTSafetyChecker`]): judges images; without an encoder, the latents of a GAN before they are drawn.
            It stays in its own precision, in which its thresholds were found.
        action (`str` or a function, defaults to `"blank"`): what happens to images that are not released:

            - `"blank"`: black, latents zero.
            - `"blur"`: see [`~hf_unlearn.filtering.drawing.actions.blur`].
            - `"flag"`: nothing, they are given out: the caller looks at `filtered`.
            - `"regenerate"`: drawn again with other noise, at most `max_tries` times, then blank. The others stay as they are.
            - `"raise"`: [`~hf_unlearn.filtering.drawing.actions.FilteredImageError`], and no image is given out.
            - a function of the images (`[k, channels, height, width]`, of videos `[k, frames, …]`; fp32, in [0, 1]) and their
              scores that gives other ones.
        max_tries (`int`, defaults to 3): further draws of `"regenerate"`.

    Raises:
        ValueError: no filter of images, or a pipeline that draws none.
    """

    _own = (*PipelineWrapper._own, *_OWN, "action", "max_tries")

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        safety_checker: FASTSafetyChecker,
        action: Action = "blank",
        max_tries: int = 3,
    ):
        super().__init__()
        self.pipeline = pipeline
        keep_origins(pipeline)
        self._wrapped = [origin(name) for name in origins_of(pipeline)]  # what these names mean now
        self.safety_checker = safety_checker
        self.action = action
        self.max_tries = max_tries

    @torch.no_grad()
    def __call__(self, *args, filter_action: Action | None = None, **kwargs) -> BaseOutput | tuple:
        """Draw images, and release those that the filter lets through.

        Args:
            args, kwargs: of the pipeline inside; `output_type` is one of `"pil"`, `"np"`, `"pt"` and, where there is a vae to decode
                them for the filter, `"latent"`.
            filter_action (`str` or a function, *optional*): instead of `action`.

        Returns:
            `BaseOutput`, or with `return_dict=False` the tuple of the pipeline inside and the filter's three values.

        Raises:
            ValueError: an action or an output that cannot be filtered.
            FilteredImageError: with `"raise"`.
        """
        action = self.action if filter_action is None else check_action(filter_action, "filter_action")
        try:
            with _lock_of(self.pipeline):
                return self._filtered(Call(self.pipeline, args, kwargs), action)
        except BaseException as error:
            forget_locals(error)
            raise

    def _filtered(self, call: Call, action: Action) -> BaseOutput | tuple:
        wanted = call["output_type"]
        check_output_type(self.pipeline, wanted)
        if wanted == "latent" and (callable(action) or action == "blur"):
            raise ValueError(f"action={action!r}: needs images, but output_type='latent' gives none")
        asked = asked_for(self.pipeline, wanted, cropped=call["padding_mask_crop"] is not None)
        draw = self._draw_judged_latents if self.safety_checker.encoder is None else self._draw_judged
        drawn, tries = draw(call.replace(output_type=asked, return_dict=True), action)
        images = self._act(drawn, action)
        output = with_verdict(
            drawn.output,
            **{drawn.content: images if wanted == "latent" else converted(images, wanted, self.pipeline)},
            filtered=drawn.flags.tolist(),
            filter_scores=drawn.scores,
            filter_tries=tries.tolist(),
        )
        return output if call["return_dict"] else as_tuple(output)

    def _draw_judged(self, call: Call, action: Action) -> tuple[Drawn, Tensor]:
        drawn = self._draw(call)
        n = len(drawn.flags)
        tries = torch.ones(n, dtype=torch.int64)
        for _ in range(self.max_tries if action == "regenerate" else 0):
            places = drawn.flags.nonzero().flatten().tolist()
            if not places:
                break
            part = call.for_places(places, n)
            new = self._draw(call.again() if part is None else part)
            picks, expected = (places, n) if part is None else (list(range(len(places))), len(places))
            if len(new.flags) != expected:
                raise ValueError(f"pipeline: drew {len(new.flags)} images again, must draw {expected}")
            drawn.take(new, picks, places)
            tries[places] += 1
        return drawn, tries

    def _draw_judged_latents(self, call: Call, action: Action) -> tuple[Drawn, Tensor]:
        """For a filter of latents: these are judged, and drawn again, before the images are drawn, once."""
        latents = call["latents"]
        if latents is None:
            latents = self._latents(call["num_images"], call["generator"])
        if not call.takes("latents"):
            raise ValueError(
                f"safety_checker: judges latents, from which {type(self.pipeline).__name__} does not draw"
            )
        flags, scores = judged(latents, self.safety_checker)
        n = len(latents)
        tries = torch.ones(n, dtype=torch.int64)
        for _ in range(self.max_tries if action == "regenerate" else 0):
            places = flags.nonzero().flatten().tolist()
            if not places:
                break
            new = self._latents(len(places), call.generator_of(places, n))
            latents = latents.clone()
            latents[places] = new.to(latents)
            flags[places], scores[places] = judged(new, self.safety_checker)
            tries[places] += 1
        drawn = self._draw(call.replace(latents=latents), verdict=(flags, scores))
        return drawn, tries

    def _latents(self, n: int, generator: Any) -> Tensor:
        prepare = getattr(self.pipeline, "prepare_latents", None)
        if prepare is None or "num_images" not in inspect.signature(prepare).parameters:
            raise ValueError(
                f"safety_checker: judges latents, which {type(self.pipeline).__name__} does not give; pass latents=, "
                "without action='regenerate', or take a filter with an encoder"
            )
        return prepare(n, generator)

    def _draw(self, call: Call, verdict: tuple[Tensor, Tensor] | None = None) -> Drawn:
        output = call()
        if not is_dataclass(output):
            raise ValueError(f"pipeline: gives a {type(output).__name__} without images, so nothing can be filtered")
        given = [item.name for item in fields(output) if getattr(output, item.name) is not None]
        content = check_fields(type(self.pipeline).__name__, type(output).__name__, given)
        images = getattr(output, content)
        as_latents = call["output_type"] == "latent"
        shown, finite = decoded(images, self.pipeline) if as_latents else as_tensor(images)
        flags, scores = judged_shown(shown, finite, self.safety_checker) if verdict is None else verdict
        if len(flags) != len(shown):
            raise ValueError(f"pipeline: drew {len(shown)} images of {len(flags)} latents")
        return Drawn(output, images if as_latents else shown, flags | ~finite, scores, content)

    def _act(self, drawn: Drawn, action: Action) -> Tensor:
        flags = drawn.flags
        if action == "flag" or not flags.any():
            return drawn.images
        if action == "raise":
            raise FilteredImageError(flags, drawn.scores)
        images = drawn.images.clone()
        places = flags.nonzero().flatten()
        action = "blank" if action == "regenerate" else action
        images[places] = replaced(images[places], drawn.scores[places], action)
        return images

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        filter: str | os.PathLike | FASTSafetyChecker | None = None,
        filter_revision: str | None = None,
        filter_encoder: nn.Module | None = None,
        action: Action | None = None,
        max_tries: int | None = None,
        **kwargs,
    ) -> FilteredPipeline:
        """A saved filtered pipeline, or any other one with a filter.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): folder or Hub id.
            filter (`str`, `Path` or [`FASTSafetyChecker`], *optional*): folder or Hub id. Needed, and taken, only for a pipeline
                that was saved without one.
            filter_revision (`str`, *optional*): of the filter's repository.
            filter_encoder ([`FilterEncoder`], *optional*): that the filter was fitted with, where it is the user's own.
            action, max_tries (*optional*): see [`FilteredPipeline`]. Default: as saved.
            kwargs: of [`~diffusers.DiffusionPipeline.from_pretrained`] for the pipeline inside: `dtype`, `variant`, `revision`, `token`…

        Raises:
            ValueError: no filter, two filters, or files that are missing, broken or of another version.
        """
        name = pretrained_model_name_or_path
        if "safety_checker" in kwargs:
            raise ValueError(
                "safety_checker: pass filter=, and for a pipeline with a checker of its own "
                "FilteredPipeline(pipeline=…, safety_checker=…)"
            )
        hub = saved.hub_arguments(kwargs)
        try:
            index, folder = saved.fetch(name, **hub)
        except (OSError, HFValidationError) as error:
            raise ValueError(
                f"{str(name)!r}: is no folder, and cannot be had from the Hub ({first_line(error)})"
            ) from error
        settings = {key: value for key, value in (("action", action), ("max_tries", max_tries)) if value is not None}
        if saved.is_filtered(index):
            if filter is not None or filter_revision is not None:
                raise ValueError(
                    f"filter: {str(name)!r} has its own; load its pipeline/ folder to put another one on it"
                )
            folder = saved.fetch_all(name, folder, **hub)
            saved.check_index(index, folder)
            elsewhere = {key: value for key, value in hub.items() if key != "revision"}
            checker = FASTSafetyChecker.from_pretrained(folder / saved.FILTER, encoder=filter_encoder, **elsewhere)
            inner = saved.load_inner(folder, index, **{key: value for key, value in kwargs.items() if key not in hub})
            settings = {key: index[key] for key in saved.SETTINGS} | settings
        elif filter is None:
            raise ValueError(f"filter=None: {str(name)!r} is a pipeline without a filter; pass filter=")
        else:
            checker = filter
            if isinstance(filter, str | os.PathLike):
                source = hub | {"revision": filter_revision}
                checker = FASTSafetyChecker.from_pretrained(filter, encoder=filter_encoder, **source)
            inner = saved.load_plain(name, index, **kwargs)
        pipe = cls(inner, checker, **settings)
        pipe.register_to_config(_name_or_path=origin(name))
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> FilteredPipeline:
        raise ValueError("from_pipe: make FilteredPipeline(pipeline=…, safety_checker=…)")

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        *,
        card: str | None = None,
        push_to_hub: bool = False,
    ) -> None:
        """Save the pipeline into `pipeline/`, the filter into `safety_checker/`, and last the index that names both.

        Args:
            save_directory (`str` or `Path`): made if it is not there.
            safe_serialization, variant, max_shard_size: of the pipeline inside, as for [`~diffusers.DiffusionPipeline.save_pretrained`];
                the filter is always safetensors. Pickles (`safe_serialization=False`) are loaded with `use_safetensors=False` only.
            card (`str`, *optional*): README.md.

        Raises:
            ValueError: a function as action, a pipeline of a class that could not be loaded again, or one with an adapter that is not
                fused.
        """
        if push_to_hub:
            raise ValueError("push_to_hub=True: save with save_pretrained, publish with push_to_hub()")
        if callable(self.action):
            raise ValueError(f"action={self.action!r}: a function is not saved; set action to a name before")
        names = saved.class_of(self.pipeline)
        check_no_adapter(self.pipeline)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        # What is half written, over an earlier save too, has no index and is loaded by nobody.
        (folder / saved.INDEX).unlink(missing_ok=True)
        for part in (folder / saved.FILTER, folder / saved.PIPELINE):
            earlier = [path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_file()]
            for name in superseded(earlier, ()):  # in other shards, variants or formats
                (part / name).unlink()
        self.safety_checker.save_pretrained(folder / saved.FILTER)
        self.pipeline.save_pretrained(
            folder / saved.PIPELINE,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
        )
        for part in (folder, folder / saved.PIPELINE):
            forget_local_paths(part)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        saved.write_index(folder, names, {name: getattr(self, name) for name in saved.SETTINGS})

    _commit_message = "Upload filtered pipeline"
    _kind = "filtered pipeline"

    def _made_from(self) -> list[str | None]:
        return [*self._wrapped, *origins_of(self.pipeline), encoder_id(self.safety_checker.config.encoder_spec)]

    def _card(self, repo_id: str, **metadata: Any) -> str:
        public = next((found for name in self._made_from()[:-1] if (found := hub_id(name))), None)
        inside = type(self.pipeline).__name__
        return filter_card(self.safety_checker.config, repo_id, inside=inside, pipeline_id=public, **metadata)

    def remove_filter(self) -> DiffusionPipeline:
        """The pipeline inside, which shows everything that it draws."""
        logger.warning("The filter is removed: %s shows all that it draws.", type(self.pipeline).__name__)
        return self.pipeline

    @property
    def action(self) -> Action:
        """What is done with what is flagged: see the class."""
        return self._action

    @action.setter
    def action(self, action: Action) -> None:
        self._action = check_action(action)
        if action == "flag":
            logger.warning("action='flag': images are given out whatever the filter says of them; look at .filtered.")

    @property
    def max_tries(self) -> int:
        """How often `"regenerate"` draws again, ≥ 1."""
        return self._max_tries

    @max_tries.setter
    def max_tries(self, number: int) -> None:
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"max_tries={number!r}: must be an integer ≥ 1")
        self._max_tries = number

    def to(self, *args, **kwargs) -> FilteredPipeline:
        """Move the pipeline to a device or precision, and the filter to the device."""
        super().to(*args, **kwargs)
        if any(value is not None and not isinstance(value, torch.dtype) for value in (*args, kwargs.get("device"))):
            self.safety_checker.to(self.pipeline.device)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            _CHECKS[name](value)
            object.__setattr__(self, name, value)
            kind = type(value)
            self.register_to_config(**{name: (kind.__module__.split(".")[0], kind.__name__)})
        else:
            super().__setattr__(name, value)


def _lock_of(pipeline: DiffusionPipeline) -> RLock:
    with _LOCK:
        return _LOCKS.setdefault(pipeline, RLock())


def _check_pipeline(pipeline: Any) -> None:
    if not isinstance(pipeline, DiffusionPipeline) or isinstance(pipeline, FilteredPipeline):
        raise ValueError(f"pipeline: is a {type(pipeline).__name__}, must be a pipeline of diffusers without a filter")
    content_of(pipeline)


def _check_filter(checker: Any) -> None:
    if not isinstance(checker, FASTSafetyChecker):
        raise ValueError(
            f"safety_checker: is {'None' if checker is None else 'a ' + type(checker).__name__}, must be a "
            "FASTSafetyChecker; remove_filter() gives the pipeline without one"
        )
    if getattr(checker.encoder, "kind", None) == "text":
        raise ValueError("safety_checker: judges texts, must judge images or latents")


_CHECKS = {"pipeline": _check_pipeline, "safety_checker": _check_filter}
