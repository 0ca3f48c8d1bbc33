"""Inputs to embeddings: what a filter sees of an image or a text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...images import check_value_range, signed
from .checkpoints import (
    KINDS,
    NOT_IN_SPEC,
    POOLINGS,
    has_optional_pooler,
    is_of_transformers,
)
from .loading import LoadsEncoders
from .preprocessing import ImagePreprocessing, example


BATCH_SIZE = 32


class FilterEncoder(LoadsEncoders, nn.Module):
    """Inputs to one embedding each: a model, how its inputs are prepared and what is taken of its outputs.

    The model is put in eval mode and stays in it (pass a copy of one that you train), and runs without gradient or
    autocast, on its own device and in its own dtype; embeddings are fp32. What an input gives does not depend on the others, but for the rounding of another batch or padding.

    Args:
        model (`PreTrainedModel`): an image or text model of transformers, without head; another: [`FilterEncoder.own`].
        kind (`str`): `"image"`, `"text"` or `"custom"` (any module from images to `[n, d]`).
        preprocessing ([`ImagePreprocessing`], *optional*): of images; by default they get `config.image_size` and stay
            in [-1, 1].
        tokenizer (tokenizer, *optional*): of texts.
        max_length (`int`, *optional*): tokens; the rest of a longer text is not seen. By default what the tokenizer
            and the model's positions hold.
        layer (`int`, *optional*): take `hidden_states[layer]` and not the model's last.
        pooling (`str`, *optional*): `"pooled"`, the model's own: `image_embeds` or `pooler_output`; `"mean"` over
            patches (no class token), space or the tokens that are not padding; `"first"`, the first token. By default
            `"mean"` for texts and with `layer`, `"first"` for ViT, whose checkpoints often lack the pooler, and
            `"pooled"` otherwise.
        normalize (`bool`, defaults to `False`): scale embeddings to length 1.
        reference (`dict`, *optional*): `id`, `revision`, `dtype` and `sha256` of weights that are not stored.
        name (`str`, *optional*): for people; the class of the model by default.
        embedding_size (`int`, *optional*): where it is known; else a first run finds it.

    Raises:
        ValueError: an argument is not as above, or does not fit the model.

    Example:

    ```python
    encoder = FilterEncoder.from_pretrained("openai/clip-vit-base-patch32")
    embeddings = encoder([Image.open("cat.png"), Image.open("dog.png")])  # [2, 512]
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        kind: Literal["image", "text", "custom"],
        preprocessing: ImagePreprocessing | None = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        layer: int | None = None,
        pooling: Literal["pooled", "mean", "first"] | None = None,
        normalize: bool = False,
        reference: dict[str, str | None] | None = None,
        name: str | None = None,
        embedding_size: int | None = None,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind: must be one of {', '.join(KINDS)}, got {kind!r}")
        if kind != "custom" and not is_of_transformers(type(model)):
            raise ValueError(f"model: {type(model).__name__} is not of transformers; use FilterEncoder.own")
        if kind != "custom" and getattr(model.config, "quantization_config", None):
            raise ValueError("model: is quantized, its weights could not be stored; load it without")
        if pooling not in (None, *POOLINGS):
            raise ValueError(f"pooling: must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        if layer is not None and (type(layer) is not int or kind == "custom" or pooling == "pooled"):
            raise ValueError(f'layer: must be a whole number with pooling "mean" or "first", got {layer!r}')
        if max_length is not None and (type(max_length) is not int or max_length < 1):
            raise ValueError(f"max_length: must be a positive number of tokens, got {max_length!r}")
        self.model = model
        self.kind = kind
        self.preprocessing = preprocessing
        if kind != "text" and preprocessing is None:
            self.preprocessing = ImagePreprocessing.of(None, getattr(model, "config", None))
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.layer = layer
        self.pooling = pooling or _default_pooling(model, kind, layer)
        self.normalize = bool(normalize)
        self.reference = reference
        self.name = name or type(model).__name__
        self._embedding_size = embedding_size
        self.eval()

    def train(self, mode: bool = True) -> FilterEncoder:
        """Stays in eval mode, whatever is asked for: what is judged must not depend on it, nor on who else is judging."""
        return super().train(False)

    @classmethod
    def own(
        cls,
        module: nn.Module | Callable[[Tensor], Tensor],
        *,
        name: str,
        size: tuple[int, int] | None = None,
        channels: int | None = None,
        normalize: bool = False,
    ) -> FilterEncoder:
        """Any module or function of images; it is not stored: whoever loads the filter passes it again.

        Args:
            module (`nn.Module` or callable): takes `[n, c, h, w]` in [-1, 1], returns `[n, d]`, `d` always the same.
            name (`str`): what a filter's file calls it.
            size (`tuple[int, int]`, *optional*): height and width it takes; by default the images' own.
            channels (`int`, *optional*): 1 or 3; by default the images' own.
            normalize (`bool`, defaults to `False`): scale embeddings to length 1.

        Raises:
            ValueError: an argument is not as above.
        """
        if not callable(module) or isinstance(module, type):
            raise ValueError(f"module: must be a module or a function of images, got {module!r}")
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: must say what the encoder is, got {name!r}")
        model = module if isinstance(module, nn.Module) else _Function(module)
        preprocessing = ImagePreprocessing(channels=channels, size=size)
        return cls(model, kind="custom", preprocessing=preprocessing, normalize=normalize, name=name)

    @property
    def spec(self) -> dict[str, Any]:
        """What [`FilterEncoder.from_spec`] needs, ready for JSON; without weights, vocabulary or local paths."""
        spec = {
            "kind": self.kind,
            "name": self.name,
            "embedding_size": self._embedding_size,
            "preprocessing": None if self.preprocessing is None else asdict(self.preprocessing),
            "max_length": self.max_length,
            "layer": self.layer,
            "pooling": self.pooling,
            "normalize": self.normalize,
            "reference": self.reference,
        }
        if self.kind != "custom":
            config = {k: v for k, v in self.model.config.to_dict().items() if not NOT_IN_SPEC.fullmatch(k)}
            spec |= {"architecture": type(self.model).__name__, "config": config | {"dtype": self._dtype_name}}
            if has_optional_pooler(type(self.model)):
                spec["add_pooling_layer"] = self.model.pooler is not None
        return json.loads(json.dumps(spec))

    @property
    def stored(self) -> bool:
        """Whether the weights belong in a filter's file: neither the user's own nor a reference."""
        return self.kind != "custom" and self.reference is None

    @property
    def embedding_size(self) -> int:
        """`d` of the embeddings; one example is run where it is not known yet.

        Raises:
            ValueError: it cannot be known before the first call.
        """
        if self._embedding_size is None:
            of_any_size = self.kind == "custom" and None in (self.preprocessing.size, self.preprocessing.channels)
            if self.device.type == "meta" or of_any_size or (self.kind == "text" and self.tokenizer is None):
                raise ValueError("embedding_size: is not known yet; embed one example first")
            self._try()
        return self._embedding_size

    @property
    def device(self) -> torch.device:
        """Of its weights; the CPU where it has none."""
        return next((tensor.device for tensor in self._tensors()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights; fp32 where it has none."""
        return next((tensor.dtype for tensor in self._tensors() if tensor.is_floating_point()), torch.float32)

    def fingerprint(self) -> str:
        """SHA-256 of the model's weights: names in order, dtypes, shapes and bytes. Another dtype is another
        fingerprint; settings and tokenizer do not count.

        Raises:
            ValueError: the user's own function has no weights to tell it by.
        """
        state = self.model.state_dict()
        if not state:
            raise ValueError(f"fingerprint: {self.name!r} has no weights")
        digest = hashlib.sha256()
        for name in sorted(state):
            tensor = state[name]
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def forward(
        self,
        inputs: Sequence[Image.Image] | Tensor | Sequence[str],
        *,
        batch_size: int | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> Tensor:
        """One embedding an input.

        Args:
            inputs (list of `PIL.Image.Image`, `Tensor` `[n, c, h, w]` in [-1, 1], or list of `str`): as for
                [`ImagePreprocessing.prepare`], or texts, which are cut after `max_length` tokens.
            batch_size (`int`, *optional*, defaults to 32): inputs at a time.
            value_range (`(-1, 1)` or `(0, 1)`, *optional*): of a tensor of floats. By default (−1, 1), and a tensor without a
                value below 0 is refused, since nearly always it is in [0, 1].

        Returns:
            `Tensor`: `[n, d]`, fp32, on the model's device. NaN where an image has a pixel that is not finite.

        Raises:
            ValueError: the inputs are not as above, or the embeddings are not `[n, d]`.
        """
        batch_size = BATCH_SIZE if batch_size is None else batch_size
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size: must be a positive whole number, got {batch_size!r}")
        embed = self._embed_texts if self.kind == "text" else self._embed_images
        check_value_range(value_range)
        if self.kind != "text" and isinstance(inputs, Tensor) and inputs.ndim == 4:
            inputs = signed(inputs, "images", value_range=value_range)
        self.eval()  # and not back: another thread may be in the middle
        with torch.autocast(self.device.type, enabled=False):
            embeddings = torch.cat([self._checked(embed(batch), len(batch)) for batch in _batches(inputs, batch_size)])
        return F.normalize(embeddings, dim=-1) if self.normalize else embeddings

    def _embed_images(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        pixels = self.preprocessing.prepare(images)
        if any(True for _ in self._tensors()):  # a function without weights works where the images are
            pixels = pixels.to(self.device)
        # A broken image is not shown to the model: it could spread, or be cleaned, and must do neither.
        broken = pixels.isnan().flatten(1).any(1)
        pixels = pixels.masked_fill(broken.reshape(-1, 1, 1, 1), 0).to(self.dtype)
        if self.kind == "custom":
            embeddings = self.model(pixels)
            if not isinstance(embeddings, Tensor):
                raise ValueError(f"module: must return a tensor [n, d], got {type(embeddings).__name__}")
        else:
            outputs = self.model(pixel_values=pixels, output_hidden_states=self.layer is not None, return_dict=True)
            embeddings = self._pooled(outputs, pixels)
        if embeddings.ndim != 2 or len(embeddings) != len(pixels) or not embeddings.is_floating_point():
            return embeddings
        return embeddings.float().masked_fill(broken.to(embeddings.device)[:, None], torch.nan)

    def _embed_texts(self, texts: Sequence[str]) -> Tensor:
        if not isinstance(texts, (list, tuple)):
            raise ValueError(f"texts: must be a list of strings, got {type(texts).__name__}")
        if odd := [type(text).__name__ for text in texts if not isinstance(text, str)]:
            raise ValueError(f"texts: must be strings, got {odd[0]} in a list")
        if self.tokenizer is None:
            raise ValueError("tokenizer: is missing; call load_tokenizer, or pass tokenizer=")
        positions = getattr(self.model.config, "max_position_embeddings", None)
        longest = min(limit for limit in (self.max_length, self.tokenizer.model_max_length, positions) if limit)
        limit = {"truncation": True, "max_length": longest} if longest < 10**9 else {}  # "no limit" is 10^30
        tokens = self.tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt", **limit)
        ids, mask = tokens["input_ids"].long(), tokens["attention_mask"].long()
        if not ids.shape[1]:  # only empty texts, and a tokenizer that frames none
            ids, mask = ids.new_full((len(ids), 1), self.tokenizer.pad_token_id), mask.new_ones(len(mask), 1)
        mask[mask.sum(1) == 0, 0] = 1  # attention to nothing is NaN: an empty text is one padding token
        ids, mask = ids.to(self.device), mask.to(self.device)
        outputs = self.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=self.layer is not None, return_dict=True
        )
        return self._pooled(outputs, mask=mask)

    def _pooled(self, outputs: Any, pixels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if self.pooling == "pooled":
            for name in ("image_embeds", "pooler_output"):
                if (pooled := getattr(outputs, name, None)) is not None:
                    return pooled.flatten(1)
            raise ValueError(f'pooling: {type(self.model).__name__} has no output of its own; use "mean" or "first"')
        hidden = outputs.last_hidden_state
        if self.layer is not None:
            states = outputs.hidden_states or ()
            if not -len(states) <= self.layer < len(states):
                raise ValueError(f"layer: {type(self.model).__name__} has {len(states)} (from 0), got {self.layer}")
            hidden = states[self.layer]
        if hidden.ndim == 4:  # feature maps
            if self.pooling == "first":
                raise ValueError(f'pooling: {type(self.model).__name__} has no tokens; use "mean"')
            return hidden.float().mean((2, 3))
        if self.pooling == "first":
            return hidden[:, 0]
        if mask is not None:
            return (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return hidden[:, self._tokens_before_patches(hidden, pixels) :].float().mean(1)

    def _tokens_before_patches(self, hidden: Tensor, pixels: Tensor) -> int:
        """Class and register tokens."""
        patch = getattr(self.model.config, "patch_size", None)
        if type(patch) is not int:
            return 0
        return max(0, hidden.shape[1] - (pixels.shape[2] // patch) * (pixels.shape[3] // patch))

    def _checked(self, embeddings: Tensor, count: int) -> Tensor:
        if embeddings.ndim != 2 or len(embeddings) != count or not embeddings.is_floating_point():
            raise ValueError(
                f"{self.name}: must give floats [{count}, d], got {embeddings.dtype} {list(embeddings.shape)}"
            )
        if self._embedding_size not in (None, embeddings.shape[1]):
            raise ValueError(
                f"{self.name}: gave embeddings of {self._embedding_size} numbers, and now of {embeddings.shape[1]}"
            )
        self._embedding_size = embeddings.shape[1]
        return embeddings.detach().float()

    def _try(self) -> Tensor:
        return self(["a"] if self.kind == "text" else [example(self.preprocessing.channels)])

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        yield from self.model.buffers()

    @property
    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def _batches(inputs: Any, size: int) -> Iterator[Any]:
    if not isinstance(inputs, (Tensor, list, tuple)):  # whoever prepares them knows what to say
        yield inputs
    elif isinstance(inputs, Tensor) and inputs.ndim == 0 or not len(inputs):
        raise ValueError("inputs: are empty, pass at least one")
    else:
        yield from (inputs[start : start + size] for start in range(0, len(inputs), size))


def _default_pooling(model: nn.Module, kind: str, layer: int | None) -> str:
    if kind == "text" or layer is not None:
        return "mean"
    if kind == "custom" or not has_optional_pooler(type(model)):
        return "pooled"
    has_class_token = any(name.rpartition(".")[2] == "cls_token" for name, _ in model.named_parameters())
    return "first" if has_class_token and not getattr(model.config, "use_mean_pooling", False) else "mean"
