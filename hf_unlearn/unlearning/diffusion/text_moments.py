"""Second moments of text states: of what is kept, and from what is asked to what is asked instead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...files import save_tensors, undamaged
from .pipelines import text_side_of
from .text_side import POOLED, TOKENS, TextSide, Told, quiet
from .wordings import EMPTY_SHARE, kept_prompts


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


PROBE = "a photo of a dog on a table"  # tells one text encoder from another


@dataclass(frozen=True)
class TextMoments:
    r"""The second moment $\frac{1}{|K|} \sum h h^\top$ of the text states of prompts, for each stream in which text reaches the denoiser:
    what is kept of a pipeline, computed once. It holds no prompts, only their sum: a few that name what is to be forgotten do no harm, many
    would keep it.

    ```python
    TextMoments.of(pipe, captions).save("kept.safetensors")
    redirect_concept(pipe, "three", keep="kept.safetensors")
    ```

    Attributes:
        second (`dict[str, Tensor]`): `[width, width]` by stream (`tokens`, `pooled`), float64, a mean over rows.
        rows (`dict[str, float]`): how many rows each is the mean of.
        probe (`dict[str, Tensor]`): mean state of one fixed prompt by stream, by which another text encoder is noticed.
    """

    second: dict[str, Tensor]
    rows: dict[str, float]
    probe: dict[str, Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, pipe: DiffusionPipeline, prompts: Sequence[str] | None = None, *, batch_size: int = 16) -> TextMoments:
        """The moments of prompts, of which a twentieth are the empty prompt, with which every guided image is drawn.

        Args:
            pipe (`DiffusionPipeline`): see [`redirect_concept`].
            prompts (`Sequence[str]`, *optional*): what is kept. Default: some thousand made from short lists of words.
            batch_size (`int`, defaults to 16): prompts encoded at once.

        Raises:
            ValueError: the pipeline is not supported.
        """
        return moments_of(text_side_of(pipe), weighted(kept_prompts() if prompts is None else prompts), batch_size)

    def save(self, path: str | Path) -> None:
        """Write to one `.safetensors` file, complete or not at all.

        Args:
            path (`str` | `Path`): of the file.
        """
        parts = {"second": self.second, "probe": self.probe}
        tensors = {f"{part}/{stream}": tensor for part, found in parts.items() for stream, tensor in found.items()}
        save_tensors(tensors, path, {stream: str(count) for stream, count in self.rows.items()})

    @classmethod
    def load(cls, path: str | Path) -> TextMoments:
        """Read what [`~TextMoments.save`] wrote.

        Args:
            path (`str` | `Path`): of the file.

        Raises:
            ValueError: the file is missing or damaged.
        """
        parts: dict[str, dict[str, Tensor]] = {"second": {}, "probe": {}}
        with undamaged(path), safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                part, _, stream = key.partition("/")
                if part not in parts:
                    raise ValueError("holds no text moments")
                parts[part][stream] = file.get_tensor(key)
            rows = {stream: float((file.metadata() or {})[stream]) for stream in parts["second"]}
        return cls(parts["second"], rows, parts["probe"])

    def plus(self, other: TextMoments) -> TextMoments:
        """The moments of both sets of prompts together.

        Args:
            other ([`TextMoments`]): of the same pipeline.
        """
        rows = {stream: self.rows[stream] + other.rows[stream] for stream in self.rows}
        second = {
            stream: (self.second[stream] * self.rows[stream] + other.second[stream].to(self.second[stream]) * other.rows[stream])
            / rows[stream]
            for stream in rows
        }  # fmt: skip
        return TextMoments(second, rows, self.probe)

    def check_fits(self, side: TextSide) -> None:
        """Refuse a pipeline that encodes text in another way.

        Args:
            side (`TextSide`): of the pipeline.

        Raises:
            ValueError: other widths, or other states of the same prompt.
        """
        probe = _probe(side)
        for stream in {*probe, *self.second}:
            mine, its = (found.get(stream) for found in (self.probe, probe))
            if mine is None or its is None or mine.shape != its.shape or not _alike(mine, its):
                raise ValueError(
                    "keep: these moments are of another text encoder; compute them with TextMoments.of(pipe)"
                )


def weighted(prompts: Iterable[str], near: Sequence[str] = ()) -> dict[str, float]:
    """Each different prompt with its weight of one, the empty one with a share of all, and others that weigh as much together."""
    weights = dict.fromkeys(prompts, 1.0)
    each = len(weights) / max(len(near), 1)
    for prompt in near:
        weights[prompt] = weights.get(prompt, 0.0) + each
    return weights | {"": max(1.0, EMPTY_SHARE * sum(weights.values()))}


@torch.no_grad()
@quiet()
def moments_of(side: TextSide, weights: Mapping[str, float], batch_size: int) -> TextMoments:
    """[`TextMoments.of`] a text side, for prompts with weights."""
    found = _Sums()
    for batch in _batches(list(weights), batch_size):
        found.add(side.told(batch), [weights[prompt] for prompt in batch])
    return found.moments(side)


class _Sums:
    """The sums that [`TextMoments`] are the means of."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, float] = {}

    def add(self, told: Told, weights: Sequence[float]) -> None:
        weight = torch.tensor(weights, dtype=torch.float64)
        for stream, (states, owner) in _rows(told).items():
            w = weight.to(owner.device)[owner]
            add_to(self.sums, stream, (states * w[:, None]).T @ states)
            self.rows[stream] = self.rows.get(stream, 0.0) + w.sum().item()

    def moments(self, side: TextSide) -> TextMoments:
        second = {stream: total / self.rows[stream] for stream, total in self.sums.items()}
        for stream, moment in second.items():
            if not moment.isfinite().all():
                raise ValueError(
                    f"pipe: its text encoder gives NaN or infinity ({stream}); load it in float32 or bfloat16"
                )
        return TextMoments(second, self.rows, _probe(side))


class Anchors:
    """What wordings of anchors are encoded as, and the moments of them all. Many concepts may have one anchor, whose wordings are encoded once.

    Args:
        side (`TextSide`): of the pipeline.
        limit (`int`): wordings that are remembered.
    """

    def __init__(self, side: TextSide, limit: int):
        self.side, self.limit = side, limit
        self._sums, self._counted = _Sums(), set()
        self._known: dict[str, Told] = {}

    def told(self, prompts: Sequence[str]) -> Told:
        """Tokens, attention and pooled vectors of the prompts."""
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]:
            told = self.side.told(new)
            self._sums.add(told, [float(prompt not in self._counted) for prompt in new])
            self._counted.update(new)
            parts = (told.tokens, told.attended, [None] * len(new) if told.pooled is None else told.pooled)
            self._known |= {prompt: Told(*one) for prompt, *one in zip(new, *parts, strict=True)}
        tokens, attended, pooled = zip(
            *((one.tokens, one.attended, one.pooled) for one in map(self._known.__getitem__, prompts)), strict=True
        )
        for prompt in list(self._known)[: max(0, len(self._known) - self.limit)]:
            del self._known[prompt]
        return Told(torch.stack(tokens), torch.stack(attended), None if pooled[0] is None else torch.stack(pooled))

    def moments(self) -> TextMoments:
        """Those of every prompt that was asked for, once each."""
        return self._sums.moments(self.side)


@torch.no_grad()
@quiet()
def moments_between(
    side: TextSide, pairs: Sequence[tuple[str, str]], anchors: Anchors, batch_size: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    r"""What a redirection asks for, as means over rows: $\sum h_p h_p^\top$ and $\sum (h_a - h_p) h_p^\top$ by stream, and the largest
    $|h_a - h_p|$.

    Which position of the anchor's wording stands for which of the concept's, see [`aligned`].

    Args:
        pairs (`Sequence[tuple[str, str]]`): a wording that names the concept, and the same with the anchor.
        anchors ([`Anchors`]): encode the latter.
    """
    sums: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    rows: dict[str, int] = {}
    largest = 0.0
    for batch in _batches(list(pairs), batch_size):
        concepts, others = zip(*batch, strict=True)
        asked, instead = side.told(concepts), anchors.told(others)
        places = aligned_places(side, batch, asked.tokens.shape[1]).to(asked.tokens.device)
        moved = instead.tokens.gather(1, places[..., None].expand(*places.shape, instead.tokens.shape[2]))
        instead = Told(moved, asked.attended, instead.pooled)
        targets = _rows(instead)
        for stream, (states, _) in _rows(asked).items():
            change = targets[stream][0] - states
            largest = max(largest, change.abs().max().item())
            for total, product in zip(sums, (states.T @ states, change.T @ states), strict=True):
                add_to(total, stream, product)
            rows[stream] = rows.get(stream, 0) + len(states)
    here, change = ({stream: total / rows[stream] for stream, total in found.items()} for found in sums)
    return here, change, largest


@torch.no_grad()
@quiet()
def last_words(side: TextSide, prompts: Sequence[str], batch_size: int) -> dict[str, Tensor]:
    """By stream the state of each prompt's last token before the end, `[rows, width]`, float64: of the empty prompt that of its first token.
    Where there are several segments, of each; a pooled vector as it is.
    """
    found: dict[str, list[Tensor]] = {}
    for batch in _batches(list(prompts), batch_size):
        told, begin = side.told(batch), 0
        for (_, length), ids in zip(side.segments(), side.ids(batch), strict=True):
            places = torch.tensor([begin + max(len(tokens) - 2, 0) for tokens in ids])
            found.setdefault(TOKENS, []).append(
                told.tokens[torch.arange(len(batch)), places.to(told.tokens.device)].double()
            )
            begin += length
        if told.pooled is not None:
            found.setdefault(POOLED, []).append(told.pooled.double())
    return {stream: torch.cat(parts) for stream, parts in found.items()}


def aligned_places(side: TextSide, pairs: Sequence[tuple[str, str]], positions: int) -> Tensor:
    """[`aligned`] for each pair of prompts and each segment: `[pairs, positions]`; positions behind the last segment stay."""
    places = torch.arange(positions).repeat(len(pairs), 1)
    asked, instead = (side.ids(prompts) for prompts in zip(*pairs, strict=True))
    begin = 0
    for number, (_, length) in enumerate(side.segments()):
        for row, (first, second) in enumerate(zip(asked[number], instead[number], strict=True)):
            places[row, begin : begin + length] = begin + torch.tensor(aligned(first, second, length))
        begin += length
    return places


def aligned(first: Sequence[int], second: Sequence[int], length: int) -> list[int]:
    """Which position of a second text stands for each position of a first one, where both are padded to `length`.

    Tokens that both have, in their order, stand for each other. Where some are exchanged for others, they are matched from the end: the
    last token of a phrase knows all of it in a causal encoder. What is left over of a longer phrase goes to the first token of the other.
    Padding stands for padding at the same place, since it knows its place; where the second text still has words, its first padding.

    Args:
        first, second (`Sequence[int]`): tokens without padding.
        length (`int`): positions.
    """
    places = [0] * len(first)
    for _, i, i_end, j, j_end in SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        for back in range(1, i_end - i + 1):
            places[i_end - back] = min(max(j_end - back, j), len(second) - 1)
    return places + [min(max(place, len(second)), length - 1) for place in range(len(first), length)]


def _rows(told: Told) -> dict[str, tuple[Tensor, Tensor]]:
    """For each stream the states that are attended to, `[rows, width]` in float64, and which prompt each is of."""
    found = {}
    for stream, states in told.streams.items():
        attended = told.attended if stream == TOKENS else told.attended.new_ones(states.shape[:2])
        found[stream] = states[attended].double(), attended.nonzero()[:, 0]
    return found


def _probe(side: TextSide) -> dict[str, Tensor]:
    with torch.no_grad():
        return {stream: states.mean(0).cpu() for stream, (states, _) in _rows(side.told([PROBE])).items()}


def _alike(first: Tensor, second: Tensor) -> bool:
    """Up to what 16 bits lose."""
    return (first - second).norm().item() <= 0.05 * max(first.norm().item(), second.norm().item())


def add_to(sums: dict[str, Tensor], stream: str, product: Tensor) -> None:
    """Add to the sum of a stream, in place."""
    if stream in sums:
        sums[stream] += product
    else:
        sums[stream] = product


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
