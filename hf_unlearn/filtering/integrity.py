"""Whether a filter's files are what was saved: by a fingerprint of all that decides, and by their size before they are read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .config import FASTConfig
from .encoding.encoders import FilterEncoder
from .scores import ScoreBank


def fingerprint(config: FASTConfig, bank: ScoreBank, encoder: FilterEncoder | None) -> str:
    """SHA-256 of everything that decides: [`fingerprint_of_scores`], the action, and of an encoder that is stored the weights,
    whatever precision they are in, and the tokenizer.
    """
    digest = hashlib.sha256(fingerprint_of_scores(config, bank).encode())
    digest.update(f"action {config.action}\n".encode())
    if encoder is not None and encoder.stored:
        _update(digest, encoder.model.state_dict())
        if encoder.tokenizer is not None:
            digest.update(json.dumps(_of_tokenizer(encoder.tokenizer), sort_keys=True).encode())
    return digest.hexdigest()


def _of_tokenizer(tokenizer: Any) -> list[Any]:
    """How texts become tokens, without what a call sets anew."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    steps = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    return [sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length, tokenizer.pad_token_id, steps]


def fingerprint_of_scores(config: FASTConfig, bank: ScoreBank) -> str:
    """SHA-256 of scores, thresholds, names, and how the encoder sees: all that earlier versions covered."""
    seen = [[concept["name"] for concept in config.concepts], config.encoder_spec, config.encoder_fingerprint]
    digest = hashlib.sha256(json.dumps(seen, sort_keys=True).encode())
    _update(digest, bank.state_dict())
    return digest.hexdigest()


def _update(digest: Any, state: dict[str, Tensor]) -> None:
    for name, value in sorted(state.items()):
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())


def check_size(make: Callable[[], nn.Module], folder: Path, name: str) -> None:
    """Refuse a config that asks for much more than the files beside it hold, before anything is made of it.

    Args:
        make: makes what it asks for; here on the meta device, and no further than it takes to see that it is too much.

    Raises:
        ValueError: twice as many weights, or more.
    """
    held = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            held += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    asked, here = 0, get_ident()

    def count(module: nn.Module, parameter_name: str, parameter: Tensor | None) -> None:
        nonlocal asked
        if get_ident() != here:  # the hook is everybody's
            return
        asked += 0 if parameter is None else parameter.numel()
        if asked > 2 * held + 1000:
            raise ValueError(
                f"{name}: config.json asks for {asked:,} weights or more, the files hold {held:,}; save the filter again"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            make()
    finally:
        hook.remove()
