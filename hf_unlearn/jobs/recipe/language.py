"""The keys of a recipe of `hf-unlearn unlearn --method sft`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .checks import check_adapter, check_at_most_one, check_needs
from .unlearn import UnlearnJob


@dataclass
class LanguageJob(UnlearnJob):
    """Which language model forgets what: the keys of a recipe with `method: sft` besides those of [`UnlearnSFTConfig`].

    Rows are named as `forget_dataset` names them. They may have any format of `SFTTrainer`, or the columns of TOFU (`question`,
    `answer`, `paraphrased_answer`, `perturbed_answer`), MUSE (`text`; `prompt` and `gt`; `question` and `answer`) and WMDP (`text`;
    to ask also `question`, `choices` and `answer`).

    Args:
        model (`str`): a folder, or an id.
        retain_dataset (`str`, *optional*): rows to keep.
        heldout_dataset (`str`, *optional*): rows that the model has never seen: the target of `forget_loss: match`.
        chat (`bool`, defaults to `False`): questions and answers become conversations, for a model with a chat template. Else they do where
            the model was evidently taught them so, which is told.
        system_prompt (`str`, *optional*): what the system says first in each.
        chat_template_kwargs (`dict`, *optional*): what the template is told, as in `{date_string: 10 Apr 2025}`.
        eval_forget (`list[str]`, *optional*): rows to ask the model about before and after. The first ones are also compared with
            `eval_heldout` and `retrained`.
        eval_kept (`list[str]`, *optional*): rows about what is to be kept: with these there is a model utility.
        eval_heldout (`str`, *optional*): rows like the first of `eval_forget` that the model has never seen: with these there are
            membership attacks.
        lora_r (`int`, *optional*): train a LoRA adapter of this rank; it is merged into what is saved.
        lora_alpha (`int`, *optional*): its scale, default twice the rank.
        lora_target_modules (`list[str]`, *optional*): its layers, default all linear ones.
        retrained (`str`, *optional*): folder or id of a model that was trained without the forget rows, to compare with.
    """

    retain_dataset: str | None = None
    heldout_dataset: str | None = None
    chat: bool = False
    system_prompt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    eval_forget: list[str] | None = None
    eval_kept: list[str] | None = None
    eval_heldout: str | None = None
    lora_r: int | None = None
    lora_alpha: int | None = None
    lora_target_modules: list[str] | None = None
    retrained: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_adapter(self)
        check_at_most_one(self, ("retain", "retain_dataset"))
        check_at_most_one(self, ("heldout_split", "heldout_dataset"))
        check_needs(self, ("system_prompt", "chat", "true"), ("chat_template_kwargs", "chat", "true"))
        needs = [name for name in ("eval_heldout", "retrained") if getattr(self, name)]
        if needs and not (self.eval_forget or self.eval_split):
            raise ValueError(
                f"eval_forget: missing, which {needs[0]} needs; set it to the rows to compare, as in locuslab/TOFU:forget10_perturbed"
            )
