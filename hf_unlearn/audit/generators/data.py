"""What an audit of generators asks for and looks at: seeds and prompts, images of the forgotten kind and of others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data import class_names, label_column, labels_of, overlap
from ...images import IMAGE_COLUMNS, image_column, is_pil, pixels
from ...modes import seeded_generator
from ..digests import digest_of_tensors
from .marker import Marker


PROMPT_COLUMNS = ("prompt", "text", "caption")
DRAWS = {"standard": 400, "quick": 200}  # unprompted
ASKED = {"standard": 100, "quick": 60}  # by prompts, or from noise of which the original makes the kind
IMAGES = {"standard": 500, "quick": 200}  # at most so many of a part
FEWEST_ASKED, LONGEST_LOOK = (
    20,
    5,
)  # noise of which the original makes the kind, and how many times the unprompted draws are looked through for it


@dataclass(frozen=True)
class Asked:
    """What is asked for, an image each: the seed of its noise, and its prompt where the generator takes one."""

    seeds: tuple[int, ...]
    prompts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, rows: slice) -> Asked:
        return Asked(self.seeds[rows], None if self.prompts is None else self.prompts[rows])

    def saying(self, prompts: Sequence[str]) -> Asked:
        """The same noise, with other prompts."""
        return Asked(self.seeds, tuple(prompts))


@dataclass(frozen=True)
class Images:
    """Images `[n, channels, height, width]` in [−1, 1], perhaps none, and the prompt of each where the generator takes one."""

    pixels: Tensor
    prompts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def select(self, rows: Tensor) -> Images:
        prompts = None if self.prompts is None else tuple(self.prompts[row] for row in rows.tolist())
        return Images(self.pixels[rows], prompts)

    def __add__(self, other: Images) -> Images:
        prompts = None if self.prompts is None else self.prompts + (other.prompts or ())
        return Images(torch.cat([self.pixels, other.pixels]), prompts)

    def shuffled(self, seed: int, *key: int) -> Images:
        return self.select(torch.randperm(len(self), generator=seeded_generator("cpu", seed, *key)))


@dataclass(frozen=True)
class GeneratorData:
    """What an audit asks for and looks at.

    Attributes:
        forget, retain ([`Images`]): of the forgotten kind, and of others; either may be empty where there are prompts.
        real (`Tensor`): images of others that draws are compared with.
        forget_prompts, retain_prompts (`tuple[str, ...]`): what asks for either; empty where the generator takes no prompts.
        unprompted ([`Asked`]): plain noise, with the empty prompt.
        asked ([`Asked`]): what the original gives the kind for: the forget prompts, or noise of which it makes the kind.
        others ([`Asked`]): what everything else is drawn by: the retained prompts, or `unprompted` itself.
        from_original (`bool`): whether `asked` was found by the original, which then gives the kind for all of it.
        false_alarms (`float`): share of the retained images that the marker takes for the kind.
        marker ([`Marker`]): see there.
        drawing (`dict`): keyword arguments of every call of a pipeline.
        forgotten (`str`): in words.
        lacks (`dict[str, str]`): what cannot be done with the audited pipeline, and why.
        digest (`str`): of all that the readings depend on.
    """

    forget: Images
    retain: Images
    real: Tensor
    forget_prompts: tuple[str, ...]
    retain_prompts: tuple[str, ...]
    unprompted: Asked
    asked: Asked
    others: Asked
    from_original: bool
    false_alarms: float
    marker: Marker
    drawing: Mapping[str, Any]
    forgotten: str
    lacks: Mapping[str, str]

    @property
    def sizes(self) -> dict[str, int]:
        sizes = {"forget": len(self.forget) or len(self.asked), "retain": len(self.retain)}
        return sizes | {"unprompted": len(self.unprompted), "asked": len(self.asked)}

    @property
    def shared_cost(self) -> int:
        """Images that are drawn whatever the checks."""
        return len(self.unprompted) + len(self.asked)

    @cached_property
    def digest(self) -> str:
        images = [self.forget.pixels, self.retain.pixels, self.real]
        seen = [self.marker(part)[0] for part in images if len(part)]
        said = [self.unprompted, self.asked, self.forget.prompts, self.retain.prompts, self.retain_prompts]
        text = json.dumps([repr(said), {name: str(value) for name, value in sorted(self.drawing.items())}])
        parts = [*images, *seen, torch.tensor(list(hashlib.blake2b(text.encode(), digest_size=16).digest()))]
        return digest_of_tensors((str(number), part) for number, part in enumerate(parts))


def generator_data(
    audited: Any,
    original: Any,
    forget: Any,
    retain: Any,
    test: Any,
    *,
    marker: Any,
    drawing: Any,
    size: str,
    seed: int,
) -> GeneratorData:
    """Read what an audit is of, at most [`IMAGES`] of a part, drawn by the seed, and find what the original is asked for the kind with.

    Args:
        audited, original ([`GeneratorSubject`]): the second one may be None.
        forget, retain, test: rows with images (and prompts), prompts alone, or a tensor of images in [−1, 1].

    Raises:
        ValueError: no forget data or none of what the generator needs, a marker that does not recognise it or takes others for it.
    """
    if forget is None or not len(forget):
        raise ValueError(
            f"forget: {'missing' if forget is None else 'is empty'}; an audit of a generator needs images of what was to be forgotten, or prompts for it"
        )
    for name, rows in (("retain", retain), ("test", test)):
        if hasattr(forget, "column_names") and rows is not None and (shared := overlap(forget, rows, "id")):
            raise ValueError(f"{name}: {shared.replace('forget_dataset', 'forget')}; take them out")
    drawing = dict(drawing or {})
    if odd := [name for name in drawing if not audited.takes(name)]:
        raise ValueError(f"drawing: {type(audited.model).__name__} takes no {odd[0]!r}; leave it out")
    shape = tuple(audited.draw(Asked((0,), ("",) if audited.is_prompted else None), drawing).shape[1:])
    parts = {
        name: _read(rows, name, shape, audited.is_prompted, IMAGES[size], seed)
        for name, rows in (("forget", forget), ("retain", retain), ("test", test))
    }
    labels = labels_of(forget) if label_column(forget) else []
    classes = tuple(sorted({one for one in labels if isinstance(one, int)}))
    known = Marker(marker, classes)
    (forgotten, forget_prompts), (kept, retain_prompts), (unseen, _) = parts.values()
    if audited.is_prompted and not forget_prompts:
        raise ValueError(
            f"forget: has no prompts, and {type(audited.model).__name__} draws by prompts; add a column 'prompt'"
        )
    if not audited.is_prompted and not len(forgotten):
        raise ValueError(f"forget: has no images, and {type(audited.model).__name__} takes no prompts; pass images")
    if len(forgotten) and (found := float(known(forgotten.pixels)[0].double().mean())) < 0.5:
        raise ValueError(
            f"marker: takes {100 * found:.0f} % of the forget images for what was to be forgotten; it must see the kind in most of them"
        )
    false_alarms = float(known(kept.pixels)[0].double().mean()) if len(kept) else 0.0
    if false_alarms > 0.5:
        raise ValueError(
            f"marker: takes {100 * false_alarms:.0f} % of the retained images for what was to be forgotten; it must see the kind in few of them"
        )
    others = unseen.pixels if len(unseen) else kept.pixels
    real = others[~known(others)[0]] if len(others) else others
    unprompted = _seeded(DRAWS[size], seed, 40, ("",) if audited.is_prompted else None)
    if audited.is_prompted:
        asked, from_original = _seeded(ASKED[size], seed, 41, forget_prompts), False
    else:
        asked, from_original = _of_the_kind(original, unprompted, known, drawing, ASKED[size], seed)
    others = _seeded(ASKED[size], seed, 44, retain_prompts) if retain_prompts else unprompted
    words = class_names(forget) or _in_words(forget_prompts, len(forgotten))
    said = tuple(forget_prompts), tuple(retain_prompts)
    return GeneratorData(
        forgotten,
        kept,
        real,
        *said,
        unprompted,
        asked,
        others,
        from_original,
        false_alarms,
        known,
        drawing,
        words,
        audited.lacks,
    )


def _seeded(count: int, seed: int, key: int, prompts: Sequence[str] | None) -> Asked:
    seeds = np.random.SeedSequence([seed, key]).generate_state(count, np.uint64) >> np.uint64(1)
    said = None if prompts is None else tuple(prompts[number % len(prompts)] for number in range(count))
    return Asked(tuple(map(int, seeds)), said)


def _of_the_kind(
    original: Any, unprompted: Asked, marker: Marker, drawing: Mapping[str, Any], count: int, seed: int
) -> tuple[Asked, bool]:
    """Noise of which the original makes the kind; plain noise where there is no original, or it hardly does."""
    if original is None:
        return unprompted[:count], False
    more = _seeded(LONGEST_LOOK * len(unprompted), seed, 42, None)
    found = _marked(unprompted, original.look(unprompted, marker, drawing).kind)
    for begin in range(0, len(more), count):
        if len(found) >= count:
            break
        part = more[begin : begin + count]
        found += _marked(part, marker(original.draw(part, drawing))[0])
    return (Asked(tuple(found[:count])), True) if len(found) >= FEWEST_ASKED else (unprompted[:count], False)


def _marked(asked: Asked, kind: Tensor) -> list[int]:
    return [seed for seed, is_kind in zip(asked.seeds, kind.tolist(), strict=True) if is_kind]


def _read(
    rows: Any, argument: str, shape: tuple[int, ...], prompted: bool, limit: int, seed: int
) -> tuple[Images, list[str]]:
    """Images with their prompts, and all different prompts."""
    none = Images(torch.zeros(0, *shape), () if prompted else None)
    if rows is None or not len(rows):
        return none, []
    if isinstance(rows[0], str):
        return none, list(dict.fromkeys(rows))
    order = torch.randperm(len(rows), generator=seeded_generator("cpu", seed, 43))[:limit].sort().values
    unsaid = ("",) * len(order) if prompted else None
    if isinstance(rows, Tensor):
        return Images(pixels(rows[order], shape, resize=False, argument=argument), unsaid), []
    if is_pil(rows[0]):
        images = [rows[row] for row in order.tolist()]
        return Images(pixels(images, shape, resize=True, argument=argument), unsaid), []
    column = next((name for name in PROMPT_COLUMNS if name in rows[0]), None) if prompted else None
    taken = [rows[row] for row in order.tolist()]
    said = None if column is None else tuple(str(row[column]) for row in taken)
    different = list(dict.fromkeys(said or ()))
    if said and not any(name in taken[0] for name in IMAGE_COLUMNS):
        return none, different
    images = [row[image_column(taken[0], argument)] for row in taken]
    return Images(
        pixels(images, shape, resize=True, argument=argument, rows=order.tolist()), said or unsaid
    ), different


def _in_words(prompts: Sequence[str], images: int) -> str:
    return f"what {prompts[0]!r} asks for" if prompts else f"what {images} images show"
