"""A filter as a step of diffusers' modular pipelines, which are no `DiffusionPipeline`s.

The path of this module stands in saved pipelines, so it stays.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, ModularPipeline, ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from torch import Tensor

from ..checker import GIVES_OUT, FASTSafetyChecker
from .actions import Action, FilteredImageError, check_action, replaced
from .formats import as_tensor
from .judging import forget_locals, judged_shown


if TYPE_CHECKING:
    from diffusers.modular_pipelines import PipelineState

logger = logging.getLogger(__name__)

COMPONENT = "image_filter"  # `safety_checker` is one of Cosmos's own
CONTENT = ("images", "videos")
# What blocks of diffusers 0.42 call other things that people see or hear.
BESIDE = ("image", "frames", "audio", "audios", "sound")
# diffusers 0.42 loads a pipeline's blocks by the name of their class alone, without what was inserted, and takes the pipeline's
# default blocks for a name that it does not know. Of this one, which says as much as can be said by a name, it can make nothing.
NO_BLOCKS = "ModularPipelineBlocks"
INDEX, CONFIG = ModularPipeline.config_name, ModularPipelineBlocks.config_name
CODE, CLASS = "filtered_blocks.py", "FilteredBlocks"


class FilterBlock(ModularPipelineBlocks):
    """The last step of a modular pipeline: releases what the filter lets through.

    ```python
    blocks = Flux2AutoBlocks()
    blocks.sub_blocks.insert("filter", FilterBlock(), len(blocks.sub_blocks))
    pipe = blocks.init_pipeline("black-forest-labs/FLUX.2-dev")
    pipe.load_components()
    pipe.update_components(image_filter=FASTSafetyChecker.from_pretrained("me/no-weapons"))
    state = pipe("a street at night")
    state.images, state.filtered, state.filter_scores

    FilterBlock.save_pipeline(pipe, "filtered")
    pipe = ModularPipeline.from_pretrained("filtered", trust_remote_code=True)  # never without its filter
    pipe.load_components()
    ```

    An image is released if all of its pixels are finite and the filter says so; a video if this holds for every frame. It judges pictures as they are
    given out, those of PIL after rounding to 8 bits. Where something is not released, what the steps before it left in the state is taken out, latents
    and all; where the filter is missing or anything goes wrong, the state is emptied and the call raises.

    Args:
        action (`str` or a function, defaults to `"blank"`): `"blank"`, `"blur"`, `"flag"`, `"raise"` or a function, as for [`FilteredPipeline`]. A
            step cannot draw again, so there is no `"regenerate"`.
        content (`str`, defaults to `"images"`): what the step before it gives, `"images"` or `"videos"`.

    Raises:
        ValueError: another action or content.
    """

    def __init__(self, action: Action = "blank", content: str = "images"):
        super().__init__()
        if action == "regenerate":
            raise ValueError("action='regenerate': a step cannot draw again; take 'blank', or 'raise' and call again")
        if content not in CONTENT:
            raise ValueError(f"content={content!r}: must be {' or '.join(map(repr, CONTENT))}")
        self.action = check_action(action)
        self.content = content
        if action == "flag":
            logger.warning(GIVES_OUT)

    @property
    def description(self) -> str:
        return "Releases only images that a filter lets through."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec(COMPONENT, FASTSafetyChecker)]

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam(self.content, required=True), InputParam("output_type", default="pil")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam(self.content),
            OutputParam("filtered", type_hint=list[bool], description="Whether it is not released as it was drawn."),
            OutputParam("filter_scores", type_hint=Tensor, description="fp32 [n, concepts]."),
        ]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        """
        Raises:
            ValueError: no filter of images, latents, or something beside the images that no filter looks at.
            FilteredImageError: with `"raise"`.
        """
        try:
            self._filter(components, state)
        except BaseException as error:
            state.values.clear()
            forget_locals(error)
            raise
        return components, state

    def _filter(self, components: ModularPipeline, state: PipelineState) -> None:
        checker = _checked(getattr(components, COMPONENT, None))
        self._check_place(components, state)
        given = state.get(self.content)
        shown, finite = as_tensor(given)
        flags, scores = judged_shown(shown, finite, checker)
        if flags.any():
            if self.action == "raise":
                raise FilteredImageError(flags, scores)
            if self.action != "flag":
                places = flags.nonzero().flatten()
                given = _with(given, places.tolist(), replaced(shown[places], scores[places], self.action))
                _forget_steps(components, state)
        state.set(self.content, given)
        state.set("filtered", flags.tolist())
        state.set("filter_scores", scores)

    def _check_place(self, components: ModularPipeline, state: PipelineState) -> None:
        if state.get("output_type") == "latent":
            raise ValueError("output_type='latent': is not filtered; ask for 'pil', 'np' or 'pt'")
        if state.get(self.content) is None:
            raise ValueError(f"{self.content}: there are none; put the filter after the step that decodes them")
        for name in BESIDE + CONTENT:
            if name != self.content and state.get(name) is not None:
                raise ValueError(f"blocks: give {name} too, which the filter does not look at")
        if not isinstance(components, ModularPipeline):
            return
        steps = list(_steps(components.blocks))
        last = max((place for place, step in enumerate(steps) if isinstance(step, FilterBlock)), default=len(steps))
        for step in steps[last + 1 :]:
            if shown := {*CONTENT, *BESIDE}.intersection(step.intermediate_output_names):
                raise ValueError(f"blocks: {type(step).__name__} gives {min(shown)} after the filter; put it last")
        components.register_to_config(_blocks_class_name=NO_BLOCKS)

    @staticmethod
    def save_pipeline(
        pipeline: ModularPipeline, save_directory: str | os.PathLike, *, repo_id: str | None = None, **kwargs: Any
    ) -> None:
        """Save a modular pipeline, its filter and, as code, the step that it is: diffusers' own `from_pretrained` loads it with
        `trust_remote_code=True` and refuses it without.

        Args:
            pipeline ([`~diffusers.ModularPipeline`]): of blocks of diffusers with a [`FilterBlock`] among them.
            save_directory (`str` or `Path`): made if it is not there.
            repo_id (`str`, *optional*): where the folder will be uploaded, whole. On the Hub diffusers looks for components where the index
                says, and without it finds none; a folder has its own.
            kwargs: of [`~diffusers.ModularPipeline.save_pretrained`].

        Raises:
            ValueError: no filter, a function as action, or blocks that are changed in other ways, of which nothing could be saved.
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError(
                "push_to_hub=True: save it, and upload the folder whole: without its code nobody loads it"
            )
        _checked(getattr(pipeline, COMPONENT, None))
        code = _code(pipeline.blocks)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        # First, so that what is half written has a filter already.
        config = {"_class_name": CLASS, "auto_map": {NO_BLOCKS: f"{Path(CODE).stem}.{CLASS}"}}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / CODE).write_text(code, encoding="utf-8")
        pipeline.register_to_config(_blocks_class_name=NO_BLOCKS)
        pipeline.save_pretrained(str(folder), **{"overwrite_modular_index": True} | kwargs)
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        for part in (value[2] for value in index.values() if isinstance(value, list) and len(value) == 3):
            if part["pretrained_model_name_or_path"] == str(folder):
                part["pretrained_model_name_or_path"] = repo_id
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _checked(checker: Any) -> FASTSafetyChecker:
    if not isinstance(checker, FASTSafetyChecker):
        found = "None" if checker is None else f"a {type(checker).__name__}"
        raise ValueError(
            f"{COMPONENT}: is {found}, must be a FASTSafetyChecker; pass it to update_components({COMPONENT}=…)"
        )
    if checker.encoder is None or checker.encoder.kind == "text":
        raise ValueError(f"{COMPONENT}: judges {'latents' if checker.encoder is None else 'texts'}, must judge images")
    return checker


def _steps(block: ModularPipelineBlocks) -> Iterator[ModularPipelineBlocks]:
    """The innermost ones, in their order; alternatives one after another."""
    for inner in block.sub_blocks.values():
        yield from _steps(inner) if inner.sub_blocks else [inner]


def _with(given: Any, places: list[int], new: Tensor) -> Any:
    """What a pipeline gave, with other images, or videos, at some places."""
    if isinstance(given, Tensor):
        given = given.clone()
        given[places] = new.to(given)
        return given
    arrays = new.cpu().movedim(-3, -1).float().numpy()
    if isinstance(given, np.ndarray):
        given = given.copy()
        given[places] = arrays
        return given
    if isinstance(given[0], list):
        values = [DiffusionPipeline.numpy_to_pil(video) for video in arrays]
    elif isinstance(given[0], np.ndarray):
        values = list(arrays)
    elif isinstance(given[0], Tensor):
        values = list(new)
    else:
        values = DiffusionPipeline.numpy_to_pil(arrays)
    changed = dict(zip(places, values, strict=True))
    return [changed.get(place, value) for place, value in enumerate(given)]


def _forget_steps(components: ModularPipeline, state: PipelineState) -> None:
    """Takes out of the state what is not of the call, and every latent: what is not released can be drawn from them."""
    asked = components.blocks.input_names if isinstance(components, ModularPipeline) else []
    for name in state.values:
        if name not in asked or name.endswith("latents"):
            state.values[name] = None


def _code(blocks: ModularPipelineBlocks) -> str:
    """A module that makes these blocks again."""
    base = next(kind for kind in type(blocks).__mro__ if getattr(diffusers, kind.__name__, None) is kind)
    own = {name: block for name, block in blocks.sub_blocks.items() if isinstance(block, FilterBlock)}
    if len(own) != 1:
        raise ValueError(f"pipeline: has {len(own)} FilterBlocks among its blocks, must have one")
    ((name, block),) = own.items()
    if callable(block.action):
        raise ValueError(f"action={block.action!r}: a function is not saved; take a name")
    place = list(blocks.sub_blocks).index(name)
    others = [(key, _form(inner)) for key, inner in blocks.sub_blocks.items() if key != name]
    if base is ModularPipelineBlocks or _form(base())[1] != others:
        raise ValueError(
            f"pipeline: its blocks are not those of {base.__name__} with a filter, so diffusers could not make them again"
        )
    return (
        f"from diffusers import {base.__name__}\n\n"
        f"from hf_unlearn.filtering.drawing.blocks import FilterBlock\n\n\n"
        f"class {CLASS}({base.__name__}):\n"
        f"    def __init__(self):\n"
        f"        super().__init__()\n"
        f"        block = FilterBlock({block.action!r}, {block.content!r})\n"
        f"        self.sub_blocks.insert({name!r}, block, {place})\n"
    )


def _form(block: ModularPipelineBlocks) -> tuple:
    """Classes and names of a block and of all inside it."""
    return type(block), [(name, _form(inner)) for name, inner in block.sub_blocks.items()]
