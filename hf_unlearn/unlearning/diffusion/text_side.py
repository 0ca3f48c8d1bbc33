"""Where text enters a text-to-image pipeline: what its denoiser is told of a prompt, and the layers that read it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import Architecture, cast


logger = logging.getLogger(__name__)

TOKENS, POOLED = "tokens", "pooled"  # the two streams in which text reaches a denoiser


@dataclass(frozen=True)
class Told:
    """What a denoiser is told of prompts.

    Attributes:
        tokens (`Tensor`): `[n, positions, width]`, as the layers that read them see them.
        attended (`Tensor`): bool `[n, positions]`; False where no layer looks.
        pooled (`Tensor`, *optional*): `[n, width]`, one vector a prompt.
        conditioning (`dict[str, Tensor]`): the same as keyword arguments of the denoiser.
    """

    tokens: Tensor
    attended: Tensor
    pooled: Tensor | None = None
    conditioning: dict[str, Tensor] = field(default_factory=dict)

    @property
    def streams(self) -> dict[str, Tensor]:
        """`[n, positions, width]` by the name of the stream; a pooled vector has one position."""
        return {TOKENS: self.tokens} | ({} if self.pooled is None else {POOLED: self.pooled[:, None]})


@dataclass(frozen=True)
class TextLayer:
    """A linear layer that reads text: its first `width` inputs are the text, which it reads from the stream of that name."""

    name: str
    linear: nn.Linear
    stream: str
    width: int


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of diffusers and transformers for the time of a `with` block, or of a function. A level is set once: setting it goes through
    all loggers.
    """
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    levels = [(library, library.get_verbosity()) for library in (of_diffusers, of_transformers)]
    loud = [(library, level) for library, level in levels if level < library.ERROR]
    for library, _ in loud:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in loud:
            library.set_verbosity(level)


def tell_of_length(argument: str, side: TextSide, prompts: Sequence[str]) -> None:
    """Say how many of an argument's prompts the encoder does not read whole, in one line for all."""
    if not prompts:
        return
    with quiet():
        whole = side.ids(prompts, whole=True)
    for (_, length), ids in zip(side.segments(), whole, strict=True):
        if long := [len(tokens) for tokens in ids if len(tokens) > length]:
            logger.warning(
                "%s: %d of %d have more than the encoder's %d tokens; what stands behind is not read",
                argument,
                len(long),
                len(prompts),
                length,
            )


class TextSide(Architecture):
    """The text side of one architecture: the layers that read text, and which position of it each word has."""

    encoders: tuple[str, ...] = ("text_encoder",)
    tokenizers: tuple[str, ...] = ("tokenizer",)

    def states(self, conditioning: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of what the denoiser is told: the tokens as its layers read them, which of them are attended to (default: as far as there are
        tokens at all), and the pooled vector.
        """
        return conditioning["encoder_hidden_states"], None, None

    def read_by(self) -> list[TextLayer]:
        """The layers that read what the prompts are encoded as."""
        raise NotImplementedError

    @cached_property
    def layers(self) -> list[TextLayer]:
        return self.read_by()

    def told(self, prompts: Sequence[str]) -> Told:
        """Encode prompts, as the pipeline does where it draws. What is cut of long ones is not said here, a line for each batch of a
        thousand prompts: of those that a user gave it has been.
        """
        with quiet():
            conditioning = cast(self.conditioning(prompts, self.device), self.denoiser.dtype)
        tokens, attended, pooled = self.states(conditioning)
        return Told(tokens, self._everywhere(tokens) if attended is None else attended, pooled, conditioning)

    def answer(self, noisy: Tensor, share: float, told: Told) -> Tensor:
        """What the denoiser answers, `[n, …]`, to noisy latents at a share of the way from the image (0) to noise (1)."""
        return self.call(self.denoiser, noisy, self.times(share, len(noisy)), told.conditioning)

    # Positions

    def segments(self) -> list[tuple[Any, int]]:
        """Tokenizers and the number of positions that each fills, one behind the other."""
        return [(self.pipe.tokenizer, self.pipe.tokenizer.model_max_length)]

    def written(self, prompts: Sequence[str]) -> list[str]:
        """Prompts as the tokenizer gets them."""
        return list(prompts)

    def ids(self, prompts: Sequence[str], *, whole: bool = False) -> list[list[list[int]]]:
        """For each segment the tokens of each prompt without padding; `whole`: also those for which there is no room."""
        found = []
        for tokenizer, length in self.segments():
            texts = self.written(prompts)
            if hasattr(self.pipe, "maybe_convert_prompt"):  # textual inversion: one word, several vectors
                texts = self.pipe.maybe_convert_prompt(texts, tokenizer)
            room = {} if whole else {"truncation": True, "max_length": length}
            found.append(tokenizer(texts, verbose=False, **room).input_ids)
        return found

    # Helpers

    def _longest(self) -> int:
        return inspect.signature(self.pipe.encode_prompt).parameters["max_sequence_length"].default

    def _everywhere(self, tokens: Tensor) -> Tensor:
        """Padding is attended to like words, as far as there are tokens at all."""
        filled = sum(length for _, length in self.segments())
        return (torch.arange(tokens.shape[1], device=tokens.device) < filled).expand(tokens.shape[:2])

    def _cross_attention(self) -> list[TextLayer]:
        from diffusers.models.attention_processor import Attention

        return [
            TextLayer(f"{name}.{projection}", linear, TOKENS, linear.in_features)
            for name, module in self.denoiser.named_modules()
            if isinstance(module, Attention) and module.is_cross_attention
            for projection in ("to_k", "to_v")
            for linear in (getattr(module, projection),)
        ]

    def _named(self, name: str, stream: str, width: int | None = None) -> TextLayer:
        linear = self.denoiser.get_submodule(name)
        return TextLayer(name, linear, stream, width or linear.in_features)
