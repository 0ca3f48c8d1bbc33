"""Whether a filter's files are what was saved: by a fingerprint of all that decides, and by their size before they are read."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from .config import FASTConfig
from .encoding.encoders import FilterEncoder
from .scores import ScoreBank


def fingerprint(config: FASTConfig, bank: ScoreBank, encoder: FilterEncoder | None) -> str:
    """SHA-256 of everything that decides: [`fingerprint_of_scores`], the action, and the weights and the vocabulary of an encoder
    that is stored, whatever precision it is in.
    """
    digest = hashlib.sha256(fingerprint_of_scores(config, bank).encode())
    digest.update(f"action {config.action}\n".encode())
    if encoder is not None and encoder.stored:
        _update(digest, encoder.model.state_dict())
        if encoder.tokenizer is not None:
            digest.update(json.dumps(sorted(encoder.tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()


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


def check_size(model: nn.Module, folder: Path, name: str) -> None:
    """Refuse a config that asks for much more than the files beside it hold, before anything is made of it.

    Args:
        model (`nn.Module`): what it asks for, on the meta device.

    Raises:
        ValueError: twice as many weights, or more.
    """
    held = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            held += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    asked = sum(parameter.numel() for parameter in model.parameters())
    if asked > 2 * held + 1000:
        raise ValueError(
            f"{name}: config.json asks for {asked:,} weights, the files hold {held:,}; save the filter again"
        )
