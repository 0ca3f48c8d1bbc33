"""Virtual prompts of PEFT, so that every example's part of their gradient can be told apart."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class SharedPrompt:
    """A handle like that of a hook: until it is removed, a model makes its virtual prompt once and the batch shares it.

    PEFT 0.21 embeds it once and then repeats it for the batch; what was told apart by example before cannot be repeated.

    Args:
        model (`PeftModel`): with prompt tuning or P-tuning.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        make = model.get_prompt

        def get_prompt(batch_size: int, *args: Any, **kwargs: Any) -> Tensor:
            return make(1, *args, **kwargs).expand(batch_size, -1, -1)

        model.get_prompt = get_prompt

    def remove(self) -> None:
        del self.model.get_prompt


def repeats_prompt(model: nn.Module) -> bool:
    """Whether a model has virtual tokens that are made once. Prefixes have a batch axis from the start."""
    config = getattr(model, "active_peft_config", None)
    return getattr(config, "peft_type", None) in ("PROMPT_TUNING", "P_TUNING", "CPT")
