"""Attention projections that were made one of, taken apart again."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import nn


def unfuse(model: nn.Module | None) -> None:
    """Take apart again, in place, the attention projections that `fuse_qkv_projections` made one of: the fused ones would be trained, and
    the single ones saved.
    """
    for layer in model.modules() if model is not None else ():
        if not isinstance(layer, Attention):
            continue
        for fused, names in (("to_qkv", ("to_q", "to_k", "to_v")), ("to_kv", ("to_k", "to_v"))):
            if not hasattr(layer, fused):
                continue
            if isinstance(layer.processor, FusedAttnProcessor2_0):  # else what it holds is not used any more
                whole, single = getattr(layer, fused), [getattr(layer, name) for name in names]
                with torch.no_grad():
                    for kind in ("weight", "bias") if whole.bias is not None else ("weight",):
                        parts = [getattr(projection, kind) for projection in single]
                        pieces = getattr(whole, kind).split([len(part) for part in parts])
                        for part, piece in zip(parts, pieces, strict=True):
                            part.copy_(piece)
            delattr(layer, fused)
        layer.fused_projections = False
        if isinstance(layer.processor, FusedAttnProcessor2_0):
            layer.set_processor(AttnProcessor2_0())
