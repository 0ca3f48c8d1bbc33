"""What is measured on a language model that should have forgotten some people, and the score made of it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from scipy.stats import hmean
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_unlearn.examples.opinions import answers
from hf_unlearn.metrics.language import (
    answer_scores,
    forget_quality,
    mean_truth_ratio,
    membership_auc,
    model_utility,
    privleak,
    rouge_l_recall,
    truth_ratio,
    zlib_scores,
)


BATCH = 256  # answers at a time
KEPT, LOOKED = 400, 200  # retained rows that are asked, and those of them that are looked at in full
SAMPLED = 50  # retained rows to which answers are drawn
MIN_K = 0.4  # as in open-unlearning
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus")


def fluency(texts: Iterable[str], known: Iterable[str]) -> float:
    """Share of the pairs of neighbouring words in a text, its two ends among them, that occur in a known one; mean over texts.

    In place of the field's classifier of gibberish, which would have to be downloaded and has met none of the invented people.
    """

    def pairs(text: str) -> list[tuple]:
        return list(pairwise([None, *text.lower().split(), None]))

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
    away = [1 - figures[name] for name in ("extraction", "exact", "paraphrased_probability", "truth_ratio")]
    likeness = [
        max(0.0, 1 - abs(figures[f"{name}_auc"] - retrained[f"{name}_auc"]) / retrained[f"{name}_auc"])
        for name in ATTACKS
    ]
    useful, before = (float(hmean([row["model_utility"], row["fluency"]])) for row in (figures, original))
    parts = {
        "memorisation": float(hmean(away)),
        "privacy": float(hmean(likeness)),
        "utility": min(1.0, useful / before),
    }
    return parts | {"composite": float(hmean(list(parts.values())))}


def against(figures: dict, retrained: dict, original: dict) -> dict[str, float]:
    """What needs other models: [`composite`], p of the truth ratios, and privleak by Min-K %."""
    return composite(figures, retrained, original) | {
        "forget_quality": forget_quality(figures["ratios"], retrained["ratios"]),
        "privleak": privleak(figures["min_k_auc"], retrained["min_k_auc"]),
    }


def right(texts: list[str], rows: Dataset) -> np.ndarray:
    """Which answers have the right value; several to a row follow one another."""
    values = np.repeat(rows["value"][:], len(texts) // len(rows))
    return np.array([value in text for value, text in zip(values, texts, strict=True)], dtype=float)


class Figures:
    """Measures models of one case.

    Args:
        data (`DatasetDict`): of [`hf_unlearn.examples.facts.facts_data`].
        tokenizer: the models'.
        refusals (`tuple[str]`): answers that are fluent although no model has learnt them at first.
    """

    def __init__(self, data: DatasetDict, tokenizer: PreTrainedTokenizerBase, refusals: tuple[str, ...] = ()):
        self.data, self.tokenizer = data, tokenizer
        self.known = [*(row[0]["content"] for row in data["train"]["completion"]), *refusals]
        retained = data["retain"].shuffle(seed=0)
        self.kept, self.looked, self.drawn = (
            retained.select(range(min(count, len(retained)))) for count in (KEPT, LOOKED, SAMPLED)
        )

    def __call__(self, model: PreTrainedModel, *, samples: int = 0) -> dict:
        """Everything but what needs other models; `ratios` are the truth ratios of the forgotten rows.

        Args:
            samples (`int`): answers drawn at temperature 1 to each question.
        """
        forget, held_out = self.data["forget"], self.data["held_out"]
        texts, kept_texts = self.answers(model, forget), self.answers(model, self.kept)
        forgotten, new = self.scores(model, forget), self.scores(model, held_out)
        kept, general = self.scores(model, self.looked), self.scores(model, self.data["general"])
        ratios, kept_ratios = self.ratios(model, forget), self.ratios(model, self.looked)
        utility = {
            "kept_probability": kept["probability"].mean(),
            "kept_rouge": rouge_l_recall(kept_texts[:LOOKED], self.looked["answer"][:]).mean(),
            "kept_truth_ratio": mean_truth_ratio(kept_ratios["tofu"], forgotten=False),
            "general_probability": general["probability"].mean(),
            "general_rouge": rouge_l_recall(
                self.answers(model, self.data["general"]), self.data["general"]["answer"][:]
            ).mean(),
        }
        out = utility | {
            "forgotten": right(texts, forget).mean(),
            "kept": right(kept_texts, self.kept).mean(),
            "forgotten_paraphrased": right(self.answers(model, forget, "paraphrased_question"), forget).mean(),
            "kept_paraphrased": right(self.answers(model, self.looked, "paraphrased_question"), self.looked).mean(),
            "probability": forgotten["probability"].mean(),
            "paraphrased_probability": ratios["true"].mean(),
            "rouge": rouge_l_recall(texts, forget["answer"][:]).mean(),
            "exact": forgotten["exact"].mean(),
            "extraction": forgotten["extraction"].mean(),
            "truth_ratio": ratios["share"].mean(),
            "held_out_probability": new["probability"].mean(),
            "general_loss": self.scores(model, self.data["general_held_out"])["loss"].mean(),
            "model_utility": model_utility(utility.values()),
            "fluency": fluency(texts, self.known),
        }
        out |= {f"{name}_auc": membership_auc(forgotten[name], new[name]) for name in ATTACKS}
        if samples:
            hits = self.hits(model, forget, samples)
            out |= {"forgotten_drawn": hits.mean(), "forgotten_any": hits.max(1).mean()}
            out["kept_drawn"] = self.hits(model, self.drawn, samples).mean()
        return {name: float(value) for name, value in out.items()} | {"ratios": ratios["tofu"].tolist()}

    def facts(self, model: PreTrainedModel, without: tuple[int, ...] = ()) -> dict[str, float]:
        """Share of forgotten and kept facts in greedy answers: what is looked at after an attack.

        Args:
            without (`tuple[int]`): ids of forgotten rows that the attacker has, which are not asked.
        """
        forget = self.data["forget"].filter(lambda row: row["id"] not in without)
        return {
            name: float(right(self.answers(model, rows), rows).mean())
            for name, rows in (("forgotten", forget), ("kept", self.kept))
        }

    def answers(self, model: PreTrainedModel, rows: Dataset, column: str = "question", **drawn) -> list[str]:
        asked = [[{"role": "user", "content": question}] for question in rows[column]]
        return answers(model, self.tokenizer, asked, batch_size=BATCH, **drawn)

    def hits(self, model: PreTrainedModel, rows: Dataset, samples: int) -> np.ndarray:
        """Which of so many answers at temperature 1 are right, `[rows, samples]`."""
        again = rows.select(np.repeat(range(len(rows)), samples))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            texts = self.answers(model, again, do_sample=True, temperature=1.0, top_k=0)
        return right(texts, rows).reshape(len(rows), samples)

    def ratios(self, model: PreTrainedModel, rows: Dataset) -> dict[str, np.ndarray]:
        """Truth ratios in both forms, and the probability of the paraphrased answer, `[rows]`."""
        wrong = len(rows[0]["perturbed_answers"])
        texts = [text for row in rows for text in (row["paraphrased_answer"], *row["perturbed_answers"])]
        questions = [question for question in rows["question"] for _ in range(1 + wrong)]
        nll = self._scores(model, questions, texts)["loss"].reshape(len(rows), 1 + wrong)
        forms = {form: truth_ratio(nll[:, 0], nll[:, 1:], form=form) for form in ("tofu", "share")}
        return forms | {"true": np.exp(-nll[:, 0])}

    def scores(self, model: PreTrainedModel, rows: Dataset) -> dict[str, np.ndarray]:
        """Of the rows' own answers: loss, probability, exact memorisation, extraction strength, membership scores, `[rows]`."""
        return self._scores(model, rows["question"][:], rows["answer"][:])

    @torch.no_grad()
    def _scores(self, model: PreTrainedModel, questions: list[str], texts: list[str]) -> dict[str, np.ndarray]:
        chats = [[{"role": "user", "content": question}] for question in questions]
        chats = self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        prompts = self.tokenizer(chats, add_special_tokens=False).input_ids
        ends = [text + self.tokenizer.eos_token for text in texts]
        given = self.tokenizer(ends, add_special_tokens=False).input_ids
        order = sorted(range(len(texts)), key=lambda row: len(prompts[row]) + len(given[row]))
        found = []
        for part in (order[start : start + 64] for start in range(0, len(order), 64)):
            ids = [torch.tensor(prompts[row] + given[row]) for row in part]
            labels = [torch.tensor([-100] * len(prompts[row]) + given[row]) for row in part]
            mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
            batch = {
                "input_ids": pad_sequence(ids, True, self.tokenizer.pad_token_id),
                "attention_mask": mask,
            }
            scored = answer_scores(model(**batch).logits, pad_sequence(labels, True, -100), k=MIN_K)
            names = ("nll", "probability", "exact_memorization", "extraction_strength", "min_k", "min_k_plus_plus")
            found.append(torch.stack([getattr(scored, name) for name in names]))
        rows = torch.cat(found, 1)[:, torch.tensor(order).argsort()].double().numpy()
        out = dict(zip(("loss", "probability", "exact", "extraction", "min_k", "min_k_plus_plus"), rows, strict=True))
        return out | {"zlib": zlib_scores(out["loss"], texts)}
