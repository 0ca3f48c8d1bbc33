"""Prompts that stand in for those to be forgotten: which one for which, what the denoiser is told of it, and the student's own answer to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..objective import Batch
from .config import DiffusionUnlearnConfig
from .denoiser import is_prompted
from .encoded import EncodedImages, encode_prompts
from .trainer import DiffusionUnlearnTrainer


@dataclass
class RedirectPromptsConfig(DiffusionUnlearnConfig):
    """Configuration of [`RedirectPromptsTrainer`]: [`DiffusionUnlearnConfig`] and these.

    > What is asked for instead
        redirect_prompt (`list[str]` | `str` | `dict[str, str]`, *optional*): the neutral prompt. Default: the empty one, which takes
            everything else that a prompt asks for with it; better is the same wording without the forgotten concept. One for all, one for
            each of `forget_prompts` in their order, or for prompts of a dataset a dict from prompt to neutral prompt.
    """

    redirect_prompt: list[str] | str | dict[str, str] | None = None

    def _check_unlearn_arguments(self) -> None:
        super()._check_unlearn_arguments()
        self._check_redirection()

    def _check_redirection(self) -> None:
        if isinstance(self.redirect_prompt, list | tuple):
            self.redirect_prompt = self._in_order(list(self.redirect_prompt))
        if odd := [prompt for prompt in self.neutral_prompts if not isinstance(prompt, str)]:
            raise ValueError(f"redirect_prompt: {odd[0]!r} is no text; give prompts")
        prompts = self.forget_prompts or []
        if self.redirect_prompt is not None and (
            same := [other for other in self.redirected(prompts) if other in prompts]
        ):
            raise ValueError(
                f"redirect_prompt: {same[0]!r} is among forget_prompts; leave the forgotten concept out of it"
            )

    def _in_order(self, neutral: list[str]) -> str | dict[str, str]:
        prompts = self.forget_prompts or []
        if len(neutral) == 1:
            return neutral[0]
        if len(neutral) != len(prompts):
            raise ValueError(
                f"redirect_prompt: has {len(neutral)} prompts for {len(prompts)} forget_prompts; give one for all, one for each, or "
                "for the prompts of a dataset a dict"
            )
        return dict(zip(prompts, neutral, strict=True))

    def redirected(self, prompts: Iterable[str]) -> list[str]:
        """The neutral prompt of each of `prompts`.

        Raises:
            ValueError: there is none for it.
        """
        given = "" if self.redirect_prompt is None else self.redirect_prompt
        if isinstance(given, dict) and (missing := [prompt for prompt in prompts if prompt not in given]):
            raise ValueError(f"redirect_prompt: has none for {missing[0]!r}; add it")
        return [given[prompt] if isinstance(given, dict) else given for prompt in prompts]

    @property
    def neutral_prompts(self) -> list[str]:
        given = "" if self.redirect_prompt is None else self.redirect_prompt
        return list(dict.fromkeys(given.values())) if isinstance(given, dict) else [given]


class RedirectPromptsTrainer(DiffusionUnlearnTrainer):
    """Base of the trainers whose forget prompts have others that stand in for them, `neutral` in a batch. Arguments as for
    [`~hf_unlearn.unlearning.diffusion.trainer.DiffusionUnlearnTrainer`], `args` a [`RedirectPromptsConfig`].
    """

    _config_class = RedirectPromptsConfig

    def _encoded(self, argument: str, dataset: Any, args: RedirectPromptsConfig) -> EncodedImages | None:
        encoded = super()._encoded(argument, dataset, args)
        if argument != "forget_dataset" or encoded is None or not is_prompted(self.pipeline):
            return encoded
        known = encoded.prompts
        if not known and isinstance(args.redirect_prompt, dict):
            raise ValueError(
                "redirect_prompt: the prompts of this forget_dataset are not known; give one neutral prompt for all"
            )
        neutral = args.redirected(known) if known else args.neutral_prompts
        tables, rows = encode_prompts(neutral, self.pipeline, device=args.device, guidance_scale=args.guidance_scale)
        count = len(next(iter(encoded.conditioning.values())))
        encoded.neutral = {name: table[rows].expand(count, *table.shape[1:]) for name, table in tables.items()}
        return encoded


class OwnAnswerTrainer(RedirectPromptsTrainer):
    """Base of concept ablation (arXiv 2303.13516) and SalUn (arXiv 2310.12508): what is asked for is what the student itself answers to the
    neutral prompt now, and samples of the original are data.
    """

    @torch.no_grad()
    def answer_without(self, batch: Batch) -> Tensor:
        """The student's own answer to the neutral prompt, through which no gradient goes."""
        return self.predictions(self.model, {**batch, "conditioning": batch["neutral"]})[0]

    def replay_loss(self, model: Callable, batch: Batch) -> Tensor:
        """The denoising error on samples of the original, `[batch]`."""
        return self.task_loss(model, batch)
