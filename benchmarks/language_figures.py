"""What is measured on a language model that should have forgotten some people, and the score made of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from datasets import Dataset, DatasetDict
from scipy.stats import hmean
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_unlearn import LanguageEvaluation
from hf_unlearn.examples.facts import known_share
from hf_unlearn.metrics.language import forget_quality, privleak
from hf_unlearn.training.answers import written
from hf_unlearn.training.evaluation import compare


DRAWN = 50  # rows to which answers are drawn, at most
BATCH, LONGEST = 128, 48  # answers at a time, and tokens of one
COLUMNS = ("prompt", "completion", "paraphrased_answer", "perturbed_answers")
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus")


def fluency(texts: Iterable[str], known: Iterable[str], names: Iterable[str] = ()) -> float:
    """Share of the pairs of neighbouring words in a text, its two ends among them, that occur in a known one; mean over texts.

    In place of the field's classifier of gibberish, which would have to be downloaded and has met none of the invented people.

    Args:
        texts, known (`list[str]`): what a model wrote, and what is fluent.
        names (`list[str]`): which are all the same.
    """
    name = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def pairs(text: str) -> list[tuple]:
        return list(pairwise([None, *name.sub("@", text).lower().split(), None]))

    seen = {pair for text in known for pair in pairs(text)}
    return float(np.mean([np.mean([pair in seen for pair in pairs(text)]) for text in texts]))


def composite(figures: dict, retrained: dict, original: dict) -> dict[str, float]:
    """Memorisation, privacy and utility as in the study of 150 models (arXiv 2605.24614), and their harmonic mean, each in [0, 1].

    - memorisation: HM(1 − extraction strength, 1 − exact memorisation, 1 − probability of the paraphrased answer, 1 − truth ratio), the
      truth ratio being true / (true + false);
    - privacy: HM over the attacks by loss, zlib, Min-K % and Min-K %++ of 1 − |AUC − AUC of retrained| / AUC of retrained, at least 0;
    - utility: HM(model utility, fluency) over the original's, at most 1. Model utility is TOFU's without its real authors and world
      facts, in whose place general rows stand, which have no truth ratio; fluency is [`fluency`] of answers about the forgotten.

    Args:
        figures, retrained, original (`dict`): of [`Figures`].
    """
    known = ("extraction_strength", "exact_memorization", "paraphrased_probability", "truth_ratio")
    leaks = [abs(figures[f"auc_{name}"] / retrained[f"auc_{name}"] - 1) for name in ATTACKS]
    useful, before = (hmean([row["model_utility"], row["fluency"]]) for row in (figures, original))
    parts = {
        "memorisation": hmean([1 - figures[name] for name in known]),
        "privacy": hmean([max(0.0, 1 - leak) for leak in leaks]),
        "utility": min(1.0, useful / before) if before else 0.0,
    }
    return {name: float(value) for name, value in (parts | {"composite": hmean(list(parts.values()))}).items()}


def against(figures: dict, retrained: dict, original: dict) -> dict[str, float]:
    """What needs other models: [`composite`], p of the truth ratios, and privleak by Min-K %."""
    return composite(figures, retrained, original) | {
        "forget_quality": forget_quality(figures["ratios"], retrained["ratios"]),
        "privleak": privleak(figures["auc_min_k"], retrained["auc_min_k"]),
    }


def right(texts: Sequence[str], rows: Dataset) -> np.ndarray:
    """Which answers have the right value, `[rows, answers to each]`; those to one row follow one another."""
    own = np.reshape(texts, (len(rows), -1))
    return np.array([[value in text for text in row] for value, row in zip(rows["value"], own, strict=True)])


class Figures:
    """Measures models of one case.

    Args:
        data (`DatasetDict`): of [`hf_unlearn.examples.facts.facts_data`].
        tokenizer: the models'.
        refusals (`tuple[str]`): answers that are fluent although no model has learnt them at first.
        limit (`int`): rows of a split that are looked at, at most; half as many kept ones, a quarter of general ones.
    """

    def __init__(
        self, data: DatasetDict, tokenizer: PreTrainedTokenizerBase, refusals: tuple[str, ...], limit: int = 200
    ):
        self.data, self.tokenizer = data, tokenizer
        self.fluent = [*(row[0]["content"] for row in data["train"]["completion"]), *refusals]
        self.names = sorted({*data["train"]["person"], *data["held_out"]["person"]} - {""})

        def rows(split: str, most: int) -> Dataset:
            return data[split].shuffle(seed=0).select(range(min(most, len(data[split]))))

        forget, kept = data["forget"].select(range(min(limit, len(data["forget"])))), rows("retain", limit // 2)
        self.asked = {"forgotten": forget, "kept": kept}
        self.forget, self.kept, self.general, self.held_out, self.general_held_out = (
            LanguageEvaluation(
                part.select_columns([name for name in COLUMNS if name in part.column_names]),
                tokenizer,
                batch_size=BATCH,
                max_new_tokens=longest,
            )
            for part, longest in (
                (forget, LONGEST),
                (kept, LONGEST),
                (rows("general", limit // 4), LONGEST),
                (rows("held_out", limit).remove_columns(list(COLUMNS[2:])), 0),
                (rows("general_held_out", limit), 0),
            )
        )

    def __call__(self, model: PreTrainedModel, *, samples: int = 0) -> dict:
        """Everything but what needs other models; `ratios` are the truth ratios of the forgotten rows.

        Args:
            samples (`int`): answers drawn at temperature 1 to each question.
        """
        forget, kept, general, held_out = (
            look(model) for look in (self.forget, self.kept, self.general, self.held_out)
        )
        out = forget.summary() | compare(forget, heldout=held_out, kept=[kept, general])
        for name, scores in (("forgotten", forget), ("kept", kept)):
            out[name] = right(scores.answers, self.asked[name]).mean()
        out |= {f"{name}_paraphrased": share for name, share in self.facts(model, paraphrased=True).items()}
        for name, scores in (("kept", kept), ("general", general), ("held_out", held_out)):
            out[f"{name}_probability"] = scores.probability.mean()
        out["general_loss"] = self.general_held_out(model).nll.mean()
        out["fluency"] = fluency(forget.answers, self.fluent, self.names)
        if samples:
            hits = {name: self._hits(model, rows, samples) for name, rows in self.asked.items()}
            out |= {f"{name}_drawn": own.mean() for name, own in hits.items()}
            out["forgotten_any"] = hits["forgotten"].any(1).mean()
        return {name: float(value) for name, value in out.items()} | {"ratios": forget.truth_ratio.tolist()}

    def facts(
        self, model: PreTrainedModel, *, without: tuple[int, ...] = (), paraphrased: bool = False
    ) -> dict[str, float]:
        """Shares of the forgotten and of the kept facts in greedy answers.

        Args:
            without (`tuple[int]`): ids of rows that do not count.
            paraphrased (`bool`): ask in the other wording.
        """
        shares = {}
        for name, rows in self.asked.items():
            rows = rows.select([place for place, number in enumerate(rows["id"]) if number not in without])
            share = known_share(model, self.tokenizer, rows, paraphrased=paraphrased, batch_size=BATCH)
            shares[name] = share
        return shares

    def _hits(self, model: PreTrainedModel, rows: Dataset, samples: int) -> np.ndarray:
        """Which answers drawn at temperature 1 have the right value, `[rows, samples]`, of [`DRAWN`] rows."""
        rows = rows.select(range(0, len(rows), -(-len(rows) // DRAWN)))
        asked = self.tokenizer.apply_chat_template(rows["prompt"][:], add_generation_prompt=True)["input_ids"]
        again = [prompt for prompt in asked for _ in range(samples)]
        drawn = written(model, self.tokenizer, again, max_new_tokens=LONGEST, batch_size=2 * BATCH)
        return right(self.tokenizer.batch_decode(drawn, skip_special_tokens=True), rows)
