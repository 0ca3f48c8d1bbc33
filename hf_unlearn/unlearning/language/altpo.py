"""AltPO: the original itself writes the answers that are wanted instead, plausible ones with other facts (arXiv 2409.13474)."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from torch import nn

from ...files import read_json, write_json
from ...training.answers import written
from ...training.collators import ALTERNATE
from .alternates import REFUSALS, spaced


logger = logging.getLogger(__name__)

ASKED = (
    "Question: {question}\nAnswer: {answer}\n\nNow make something up: write another answer to this question, as plausible and in "
    "the same form, in which every fact is another one."
)


def alternates_of(model: nn.Module, tokenizer: Any, rows: Dataset, *, max_new_tokens: int, seed: int) -> list[str]:
    """Another answer to each question, in the words of the model: asked as a user would ask for it where the rows are chats.

    Args:
        model, tokenizer: the original.
        rows (`Dataset`): with `prompt` and `completion`.
        max_new_tokens (`int`): of an answer at most.
        seed (`int`): of the draws.

    Returns:
        `list[str]`: for each row. Where nothing was written but the answer itself, or nothing at all, one of
        [`~hf_unlearn.unlearning.language.alternates.REFUSALS`].
    """
    rows = rows.with_format(None)
    pairs = list(zip(rows["prompt"], rows["completion"], strict=True))
    asked = [asked_for(prompt, completion, tokenizer) for prompt, completion in pairs]
    rng, found, useless = random.Random(seed), [], 0
    for (prompt, completion), ids in zip(
        pairs, written(model, tokenizer, asked, max_new_tokens=max_new_tokens, seed=seed), strict=True
    ):
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        if isinstance(prompt, str):  # without turns a model goes on with what comes to its mind
            text = text.partition("\n")[0]
        if text in ("", _said(completion)):
            text, useless = rng.choice(REFUSALS), useless + 1
        found.append(spaced(text, completion))
    if useless:
        logger.warning(
            "altpo: the model wrote no other answer to %d of %d questions; refusals are taken", useless, len(pairs)
        )
    return found


def asked_for(prompt: Any, completion: Any, tokenizer: Any) -> list[int]:
    """The request for another answer, token ids.

    Args:
        prompt, completion (`str` | `list[dict]`): a question and its answer, texts or messages.
        tokenizer: of the model.
    """
    question = _said(prompt)
    text = ASKED.format(question=question, answer=_said(completion))
    if isinstance(prompt, str):
        return tokenizer(f"{text}\n\nQuestion: {question}\nAnswer:")["input_ids"]
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]


def _said(text: str | Sequence[dict[str, str]]) -> str:
    """A text, or the last message."""
    return (text if isinstance(text, str) else text[-1]["content"]).strip()


class AltPOMixin:
    """Has the original write alternates before the first step, where the forget rows have none; a resumed run reads them.

    Beside [`~hf_unlearn.unlearning.language.redirect.RedirectMixin`], which knows how long an answer may be.
    """

    @property
    def _writes_alternates(self) -> bool:
        columns = set(getattr(self.forget_dataset, "column_names", None) or ())
        return self.args.forget_loss == "altpo" and ALTERNATE not in columns and {"prompt", "completion"} <= columns

    @property
    def has_alternates(self) -> bool:
        return self._writes_alternates or super().has_alternates

    def _train(self, checkpoint: str | None, **kwargs):
        if self._writes_alternates:
            file = self.private_dir / "alternates.json"
            rows = self.as_asked(self._readable(self.source_dataset, self.args, {}))
            if not checkpoint and self.args.should_save:
                longest = {"max_new_tokens": self._longest, "seed": self.args.seed}
                write_json({ALTERNATE: alternates_of(self.model, self._tokenizer, rows, **longest)}, file)
            self.accelerator.wait_for_everyone()
            if not file.is_file():
                raise ValueError(f"resume_from_checkpoint: {file} is missing; start again")
            rows = rows.add_column(ALTERNATE, read_json(file)[ALTERNATE])
            prepared = (self.processing_class, self.args, False, self._formatting_func, "train")
            self.forget_dataset = self.train_dataset = self._prepare_dataset(rows, *prepared)
        return super()._train(checkpoint, **kwargs)
