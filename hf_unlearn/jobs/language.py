"""The job of `hf-unlearn unlearn --method sft`: language models, and what they are asked before and after."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from ..files import loading
from ..hub.card import Figure
from ..training.checks import check_processes
from ..training.choices import ChoiceEvaluation
from ..training.evaluation import LanguageEvaluation, LanguageScores, compare
from ..training.models import load_model
from ..training.texts import as_chat, as_prompt_completion
from .keys import adapter_of
from .selecting import Parts, place, rows_of, select
from .unlearn import forget_and_tell, trainer_of


if TYPE_CHECKING:
    from datasets import Dataset

    from ..unlearning.config import UnlearnSFTConfig
    from ..unlearning.language.trainer import UnlearnSFTTrainer
    from .recipe.language import LanguageJob


SUBJECTS = {"wmdp-bio": "biology", "wmdp-chem": "chemistry", "wmdp-cyber": "cybersecurity"}
EXAMPLES = {"forget": "forgotten examples", "kept": "other examples", "heldout": "unseen examples"}
# Name on the card, unit and scale; of what is not forgotten only the first ones.
MEASURED = {
    "loss": ("Loss", "nats", 1),
    "probability": ("Answer probability", "%", 100),
    "rouge_l": ("ROUGE-L recall", "%", 100),
    "accuracy": ("Accuracy", "%", 100),
    "exact_memorization": ("Exact memorization", "%", 100),
    "extraction_strength": ("Extraction strength", "%", 100),
    "paraphrased_probability": ("Paraphrased answer probability", "%", 100),
    "truth_ratio": ("Truth ratio, true / (true + false),", "", 1),
}
BRIEFLY = ("loss", "probability", "rouge_l", "accuracy")
COMPARED = {
    "forget_quality": ("Forget quality (p of truth ratios like the retrained model's)", ""),
    "auc_loss": ("Membership attack by loss, AUC", ""),
    "auc_zlib": ("Membership attack by zlib, AUC", ""),
    "auc_min_k": ("Membership attack by Min-K %, AUC", ""),
    "auc_min_k_plus_plus": ("Membership attack by Min-K %++, AUC", ""),
    "auc_reference": ("Membership attack by reference model, AUC", ""),
    "privleak": ("PrivLeak", "%"),
    "model_utility": ("Model utility", ""),
}


@dataclass(frozen=True)
class Asked:
    """A set of rows that models are asked about.

    Attributes:
        role (`"forget"` | `"kept"` | `"heldout"`): what they are.
        split (`str`): what the card calls them.
        evaluation: says what a model knows of them.
    """

    role: str
    split: str
    evaluation: LanguageEvaluation | ChoiceEvaluation


def run_language(
    job: LanguageJob, config: UnlearnSFTConfig, trainer_class: type[UnlearnSFTTrainer]
) -> dict[str, Any] | None:
    """Select, ask, train, ask again, save, and say where things are.

    Raises:
        ValueError: something in the recipe does not fit the model or the data; nothing was trained.
        FloatingPointError: the loss is not finite.
    """
    check_processes(config)
    if job.retrained:
        with loading("retrained", job.retrained, "a model"):
            AutoConfig.from_pretrained(job.retrained)
    parts = _selected(job, config.id_column)
    trainer = trainer_of(job, config, trainer_class, parts, peft_config=adapter_of(job, "CAUSAL_LM"))
    if not parts.dataset and job.forget_dataset:
        trainer.card_values = replace(parts, dataset=place(job.forget_dataset)[0]).card_values
    asked = _asked(job, trainer, parts)
    return forget_and_tell(trainer, len(parts.forget), partial(_look, asked), partial(_figures, job, asked))


def _selected(job: LanguageJob, id_column: str) -> Parts:
    parts = select(job, id_column)
    named = {
        name: rows_of(word, f"{name}_dataset", job.split)
        for name, word in (("retain", job.retain_dataset), ("heldout", job.heldout_dataset))
        if word
    }
    parts = replace(parts, **named)
    return replace(
        parts,
        forget=readable(job, parts.forget, "forget_dataset"),
        retain=readable(job, parts.retain, "retain_dataset"),
        heldout=readable(job, parts.heldout, "heldout_dataset"),
        evaluation={name: readable(job, rows, "eval_split") for name, rows in parts.evaluation.items()},
    )


def readable(job: Any, rows: Dataset | None, key: str) -> Dataset | None:
    """With columns as [`~hf_unlearn.training.texts.as_prompt_completion`] knows them.

    Args:
        job: with the keys `chat`, `system_prompt` and `chat_template_kwargs`.
        key (`str`): what to call the rows in an error.
    """
    if rows is None or "choices" in rows.column_names:
        return rows
    if {"prompt", "gt"} <= {*rows.column_names}:  # MUSE's texts to go on with
        return rows.map(lambda row: {"completion": f" {row['gt']}"}, remove_columns="gt")
    if not job.chat:
        return rows
    return as_chat(rows, key, system=job.system_prompt, template_kwargs=job.chat_template_kwargs)


def _asked(job: LanguageJob, trainer: UnlearnSFTTrainer, parts: Parts) -> list[Asked]:
    """Forget rows come first, and of those the ones that are compared."""
    found = []
    for role, key in (("forget", "eval_forget"), ("kept", "eval_kept"), ("heldout", "eval_heldout")):
        words = getattr(job, key) or []
        for word in [words] if isinstance(words, str) else words:
            _, *named = place(word)
            rows = readable(job, rows_of(word, key), key)
            split = ":".join(filter(None, named)) or role
            found.append(Asked(role, split, _evaluation(rows, key, named[0], trainer)))
    for name, rows in parts.evaluation.items():
        role = "forget" if name == "forget" else "kept"
        found.append(Asked(role, parts.splits[name], _evaluation(rows, "eval_split", None, trainer)))
    return sorted(found, key=lambda one: [*EXAMPLES].index(one.role))


def _evaluation(
    rows: Dataset, key: str, config: str | None, trainer: UnlearnSFTTrainer
) -> LanguageEvaluation | ChoiceEvaluation:
    settings: dict[str, Any] = {"batch_size": trainer.args.eval_batch_size}
    if "choices" not in rows.column_names:
        rows = trainer.as_asked(as_prompt_completion(rows, "text", key), key)
    try:
        if "choices" in rows.column_names:
            return ChoiceEvaluation(rows, trainer.processing_class, subject=SUBJECTS.get(config), **settings)
        return LanguageEvaluation(rows, trainer.processing_class, max_length=trainer.args.max_length, **settings)
    except ValueError as error:
        raise ValueError(str(error).replace("rows", key, 1)) from error


def _look(asked: list[Asked], trainer: UnlearnSFTTrainer, model: Any = None) -> list[Any]:
    model = trainer.model if model is None else model
    return [one.evaluation(model) for one in asked]


def _figures(
    job: LanguageJob, asked: list[Asked], trainer: UnlearnSFTTrainer, before: list[Any], after: list[Any]
) -> list[Figure]:
    looks = {"before": before, "after": after}
    if job.retrained:
        model, *_ = load_model(job.retrained, trainer.args, trainer.processing_class)
        looks["retrained"] = _look(asked, trainer, model.to(trainer.args.device))
        del model
    found = []
    for number, one in enumerate(asked):
        means = {when: scores[number].summary() for when, scores in looks.items()}
        for metric, (name, unit, scale) in MEASURED.items():
            if metric in means["after"] and (one.role == "forget" or metric in BRIEFLY):
                values = {when: scale * of[metric] for when, of in means.items()}
                found.append(_figure(metric, f"{name} on the {EXAMPLES[one.role]}", unit, one.split, values))
    compared = {when: _compared(asked, scores, looks.get("retrained")) for when, scores in looks.items()}
    compared.get("retrained", {}).pop("forget_quality", None)  # of the model and itself
    for metric, (name, unit) in COMPARED.items():
        values = {when: figures[metric] for when, figures in compared.items() if metric in figures}
        if "after" in values:
            split = "all that is kept" if metric == "model_utility" else asked[0].split
            found.append(_figure(metric, name, unit, split, values))
    return [figure for figure in found if figure is not None]


def _compared(asked: list[Asked], scores: list[Any], retrained: list[Any] | None) -> dict[str, float]:
    """What takes several sets to say; see [`~hf_unlearn.training.evaluation.compare`]."""

    def of(role: str, scores: list[Any]) -> list[LanguageScores]:
        return [s for one, s in zip(asked, scores, strict=True) if one.role == role and isinstance(s, LanguageScores)]

    if not of("forget", scores):
        return {}
    heldout = (of("heldout", scores) or [None])[0]
    others = {}
    if retrained is not None:
        others = {
            "retrained": of("forget", retrained)[0],
            "retrained_heldout": (of("heldout", retrained) or [None])[0],
        }
    return compare(of("forget", scores)[0], heldout=heldout, kept=of("kept", scores), **others)


def _figure(metric: str, name: str, unit: str, split: str, values: dict[str, float]) -> Figure | None:
    if not all(map(math.isfinite, values.values())):
        return None
    return Figure(metric=metric, name=name, unit=unit, split=split, **values)
