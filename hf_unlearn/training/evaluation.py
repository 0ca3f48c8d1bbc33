"""What is measured of a language model that should have forgotten, in one call: TOFU's and MUSE's figures of a set of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..metrics import language
from ..modes import looking
from .answers import Answer, as_inputs, as_pair, greedy_answers, longest_first, padded, read_answer
from .checks import check_number, shown
from .logits import answered, in_batches, logits_at
from .losses import IGNORED
from .texts import as_prompt_completion, check_template, check_texts


TRUE, FALSE = "paraphrased_answer", ("perturbed_answers", "perturbed_answer")
ASKED_AGAIN = "paraphrased_question"
ATTACKS = {"loss": "nll", "zlib": "zlib", "min_k": "min_k", "min_k_plus_plus": "min_k_plus_plus"}


@dataclass(frozen=True, eq=False)
class LanguageScores:
    """Of each row, in their order; what cannot be measured on these rows is None.

    Attributes:
        nll (array): mean negative log-likelihood of the answer's tokens, `[rows]`, nats.
        exact_memorization, extraction_strength, min_k, min_k_plus_plus (array): see
            [`~hf_unlearn.metrics.language.AnswerScores`], `[rows]`.
        zlib (array): [`~hf_unlearn.metrics.language.zlib_scores`], `[rows]`.
        answers (`tuple[str]`, *optional*): what the model answers, greedily.
        rouge_l (array, *optional*): ROUGE-L recall of that, `[rows]` in [0, 1].
        true_nll (array, *optional*): as `nll`, of the true answer in another wording, `[rows]`.
        false_nll (array, *optional*): as `nll`, of the false answers, `[rows, answers]`.
    """

    nll: NDArray[np.float64]
    exact_memorization: NDArray[np.float64]
    extraction_strength: NDArray[np.float64]
    min_k: NDArray[np.float64]
    min_k_plus_plus: NDArray[np.float64]
    zlib: NDArray[np.float64]
    answers: tuple[str, ...] | None = None
    rouge_l: NDArray[np.float64] | None = None
    true_nll: NDArray[np.float64] | None = None
    false_nll: NDArray[np.float64] | None = None

    @property
    def probability(self) -> NDArray[np.float64]:
        """Of the answer, normalised for its length; where there are false answers but no other wording of the true one, as of TOFU's
        real authors and world facts, its share among them; `[rows]` in [0, 1].
        """
        if self.false_nll is not None and self.true_nll is None:
            return language.option_probability(self.nll, self.false_nll)
        return np.exp(-self.nll)

    @property
    def truth_ratio(self) -> NDArray[np.float64] | None:
        """How likely the false answers are beside the true one, in another wording if there is one, `[rows]`."""
        if self.false_nll is None:
            return None
        return language.truth_ratio(self.nll if self.true_nll is None else self.true_nll, self.false_nll)

    def summary(self) -> dict[str, float]:
        """Means over the rows; each but `loss` (nats) in [0, 1], and the higher the more is known. `truth_ratio` is true / (true + false)
        here, `paraphrased_probability` of the true answer in another wording.
        """
        means = {
            "loss": self.nll,
            "probability": self.probability,
            "rouge_l": self.rouge_l,
            "exact_memorization": self.exact_memorization,
            "extraction_strength": self.extraction_strength,
            "paraphrased_probability": None if self.true_nll is None else np.exp(-self.true_nll),
            "truth_ratio": None if self.truth_ratio is None else 1 / (1 + self.truth_ratio),
        }
        return {name: float(values.mean()) for name, values in means.items() if values is not None}


class LanguageEvaluation:
    """Measures what language models know of a set of rows: `LanguageEvaluation(rows, tokenizer)(model).summary()`.

    The tokens that count are those that [`~trl.SFTTrainer`] counts, of `messages` the last one's. Rows are tokenised once; a model is
    asked without gradients, in eval mode, and neither that nor the random state is changed.

    Args:
        rows (`Dataset`): in a format of `SFTTrainer`, or with `question` and `answer`, or tokenised. In TOFU's shape they also
            have `paraphrased_answer`, the true answer in another wording, and `perturbed_answers` (or `perturbed_answer`), false
            ones, of each row as many: these are needed for truth ratios.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        batch_size (`int`, defaults to 16): answers at a time.
        max_length (`int`, *optional*): what comes after so many tokens is cut off.
        max_new_tokens (`int`, *optional*): limit of a greedy answer. Default: twice the longest answer of the rows. With 0 none is
            asked for, and there is no ROUGE-L.
        k (`float`, defaults to 0.4): share of the least likely tokens that Min-K % takes, open-unlearning's for TOFU and MUSE.
        paraphrased (`bool`, defaults to `False`): ask the `paraphrased_question` instead.

    Raises:
        ValueError: no rows, a row that cannot be read, or columns that are missing.
    """

    def __init__(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        k: float = 0.4,
        paraphrased: bool = False,
    ):
        if not isinstance(rows, Dataset) or not len(rows):
            what = "is empty" if isinstance(rows, Dataset) else f"{type(rows).__name__} is not a datasets.Dataset"
            raise ValueError(f"rows: {what}; pass a Dataset of questions and answers")
        if paraphrased and ASKED_AGAIN not in rows.column_names:
            raise ValueError(f"paraphrased=True: rows have no column {ASKED_AGAIN!r} ({', '.join(rows.column_names)})")
        for name, value, rule in (
            ("batch_size", batch_size, "≥ 1"), ("max_length", max_length, "≥ 2"), ("max_new_tokens", max_new_tokens, "≥ 0"), ("k", k, "in (0, 1]"),
        ):  # fmt: skip
            check_number(name, value, rule)
        rows = as_prompt_completion(rows, "text", "rows").with_format(None)
        check_texts(rows, "text", "rows")
        check_template(rows, tokenizer, "rows")
        self.tokenizer, self.batch_size, self.k = tokenizer, batch_size, k
        self._max_length = max_length
        self._answers: list[Answer] = []
        self._true: list[Answer] = []
        self._false: list[list[Answer]] = []
        false = next((name for name in FALSE if name in rows.column_names), None)
        for number, row in enumerate(rows):
            try:
                row = as_pair(row)
                row = row | _asked(row) if paraphrased else row
                self._answers.append(self._read(row))
                if "completion" not in row or "input_ids" in row:
                    continue  # nothing in whose place another answer could stand
                if TRUE in row:
                    self._true += self._others(row, TRUE, [row[TRUE]])
                if false:
                    texts = row[false] if isinstance(row[false], list) else [row[false]]
                    self._false.append(self._others(row, false, texts))
            except ValueError as error:
                raise ValueError(f"rows: row {number} {error}") from error
        if false and len({len(answers) for answers in self._false}) > 1:
            raise ValueError(f"rows: column {false!r} has more answers in one row than in another; give all as many")
        self.references = [tokenizer.decode(answer.counted, skip_special_tokens=True) for answer in self._answers]
        longest = max(len(answer.counted) for answer in self._answers)
        self.max_new_tokens = 2 * longest if max_new_tokens is None else max_new_tokens

    def _read(self, row: dict[str, Any]) -> Answer:
        return read_answer(row, self.tokenizer, self._max_length)

    def _others(self, row: dict[str, Any], column: str, texts: list[Any]) -> list[Answer]:
        return [self._read(row | _answered(row, _text(text, column))) for text in texts]

    def __call__(self, model: nn.Module | Callable) -> LanguageScores:
        """What `model` knows of the rows.

        Args:
            model: a causal language model, with or without an adapter; or anything that answers `model(input_ids=…, attention_mask=…,
                use_cache=False)` with `logits`, and is not asked for greedy answers if it has no `generate`.
        """
        with looking(model) as device:
            scores = self._scores(model, self._answers, device)
            written = None
            if self.max_new_tokens and hasattr(model, "generate") and all(answer.prompt for answer in self._answers):
                prompts = [answer.prompt for answer in self._answers]
                size, limit = self.batch_size, self.max_new_tokens
                written = greedy_answers(model, self.tokenizer, prompts, max_new_tokens=limit, batch_size=size)
            true = self._scores(model, self._true, device)["nll"] if self._true else None
            false = [answer for answers in self._false for answer in answers]
            false = self._scores(model, false, device)["nll"].reshape(len(self._false), -1) if false else None
        return LanguageScores(
            **scores,
            zlib=language.zlib_scores(scores["nll"], self.references),
            answers=None if written is None else tuple(written),
            rouge_l=None if written is None else language.rouge_l_recall(written, self.references),
            true_nll=true,
            false_nll=false,
        )

    def _scores(self, model: Callable, answers: Sequence[Answer], device: torch.device) -> dict[str, NDArray]:
        return score(model, answers, batch_size=self.batch_size, device=device, k=self.k)


def score(
    model: Callable, answers: Sequence[Answer], *, batch_size: int, device: torch.device, k: float = 0.4
) -> dict[str, NDArray[np.float64]]:
    """The fields of [`~hf_unlearn.metrics.language.AnswerScores`], `[answers]` each, in their order.

    Args:
        model, device: as [`~hf_unlearn.modes.looking`] leaves and gives them.
        answers (`list[Answer]`): at least one.
        batch_size, k: see [`LanguageEvaluation`].
    """
    found = {field.name: np.empty(len(answers)) for field in fields(language.AnswerScores)}
    order = sum(longest_first([answer.ids for answer in answers], batch_size), [])
    for batch in in_batches(order, [len(answer.counted) for answer in answers], batch_size, model):
        part = [answers[row] for row in batch]
        inputs = as_inputs([answer.ids for answer in part], device)
        labels = padded([answer.labels for answer in part], IGNORED, device)
        logits = logits_at(model, inputs, answered(labels))
        scores = language.answer_scores(logits, labels, k=k)
        for name, values in found.items():
            values[batch] = getattr(scores, name).double().cpu().numpy()
    return found


def compare(
    forget: LanguageScores,
    *,
    heldout: LanguageScores | None = None,
    kept: Sequence[LanguageScores] = (),
    retrained: LanguageScores | None = None,
    retrained_heldout: LanguageScores | None = None,
) -> dict[str, float]:
    """What takes more than one set of rows, or another model, to say.

    Args:
        forget ([`LanguageScores`]): of the forgotten rows.
        heldout ([`LanguageScores`], *optional*): of rows like them that were never trained on.
        kept (`list[LanguageScores]`, defaults to none): of sets that are to be kept.
        retrained, retrained_heldout ([`LanguageScores`], *optional*): of a model that was trained without the forgotten rows, on
            those and on `heldout`.

    Returns:
        `dict[str, float]`: those that can be told of:

        - `forget_quality`: see [`~hf_unlearn.metrics.language.forget_quality`];
        - `auc_loss`, `auc_zlib`, `auc_min_k`, `auc_min_k_plus_plus`: success of attacks that tell forgotten rows from held-out ones; and
          `auc_reference`, of the loss minus the retrained model's;
        - `privleak`: see [`~hf_unlearn.metrics.language.privleak`], by Min-K % as MUSE;
        - `model_utility`: harmonic mean of probability, ROUGE-L recall and truth ratio (max(0, 1 − false / true)) of each kept set.
    """
    figures = {}
    if retrained is not None and forget.truth_ratio is not None:
        figures["forget_quality"] = language.forget_quality(forget.truth_ratio, retrained.truth_ratio)
    if heldout is not None:
        figures |= {f"auc_{name}": _auc(forget, heldout, field) for name, field in ATTACKS.items()}
        if retrained is not None and retrained_heldout is not None:
            figures["auc_reference"] = language.membership_auc(
                forget.nll - retrained.nll, heldout.nll - retrained_heldout.nll
            )
            figures["privleak"] = language.privleak(figures["auc_min_k"], _auc(retrained, retrained_heldout, "min_k"))
    if kept:
        figures["model_utility"] = language.model_utility([value for scores in kept for value in _useful(scores)])
    return figures


def _auc(members: LanguageScores, others: LanguageScores, field: str) -> float:
    return language.membership_auc(getattr(members, field), getattr(others, field))


def _useful(scores: LanguageScores) -> list[float]:
    values = [float(scores.probability.mean())]
    if scores.rouge_l is not None:
        values.append(float(scores.rouge_l.mean()))
    if scores.truth_ratio is not None:
        values.append(language.mean_truth_ratio(scores.truth_ratio, forgotten=False))
    return values


# Rows in other words


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"has {shown(value)} in column {column!r}, which is no text; fill it in")
    return value


def _answered(row: dict[str, Any], text: str) -> dict[str, Any]:
    """Another answer, in the form of the row's own: a message, or a text that begins with the same space."""
    own = row["completion"]
    if isinstance(own, list):
        return {"completion": _said(own, text)}
    return {"completion": own[: len(own) - len(own.lstrip())] + text.lstrip()}


def _asked(row: dict[str, Any]) -> dict[str, Any]:
    """The other question, in the form of the row's own."""
    text = _text(row[ASKED_AGAIN], ASKED_AGAIN)
    if "prompt" not in row:
        raise ValueError("has no prompt that could be asked in other words; leave paraphrased=True out")
    return {"prompt": text if isinstance(row["prompt"], str) else _said(row["prompt"], text)}


def _said(messages: list[dict[str, str]], text: str) -> list[dict[str, str]]:
    """With other words in the last one."""
    return [*messages[:-1], messages[-1] | {"content": text}]
