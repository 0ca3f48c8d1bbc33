"""The job of `hf-unlearn influence`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import AutoConfig

from .. import data
from ..examples.datasets import load, one_split, with_wrong_labels
from ..files import loading
from ..influence.report.report import COLUMNS, InfluenceReport
from ..influence.tokens import attribute_tokens
from ..training.checks import check_processes
from ..training.models import is_causal_lm, load_model
from .keys import adapter_of, console, run_training, show_code


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from ..influence.config import FINEArguments
    from ..influence.trainer import InfluenceTrainer
    from .recipe.attribute import AttributeJob
    from .recipe.influence import InfluenceJob


INSPECTED = 0.2  # share of the examples that the printed recall allows one to look at


def run_influence(
    job: InfluenceJob, config: FINEArguments, trainer_class: type[InfluenceTrainer]
) -> dict[str, Any] | None:
    """Train, judge, save, and say where things are.

    Raises:
        ValueError: something in the recipe does not fit the model or the data; nothing was written.
        FloatingPointError: the training or the sweep is not finite.
    """
    check_processes(config)
    splits = load(job.dataset, revision=job.dataset_revision)
    train, check = training_rows(job, splits, config.id_column, config.seed)
    model, processing_class = _model(job, config, train)
    if job.method == "sft" and not is_causal_lm(model):
        raise ValueError(f"method: 'sft' trains causal language models, and {job.model!r} is a {type(model).__name__}")
    trainer = trainer_class(
        model,
        config,
        train_dataset=train,
        target_dataset=None if job.target else targets_of(job, splits),
        target=job.target,
        processing_class=processing_class,
        peft_config=adapter_of(job, "CAUSAL_LM" if job.method == "sft" else None),
    )
    run_training(trainer)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return None
    columns = {check, job.group_column, data.label_column(train), shown_column(train)} - {None}
    report = trainer.influence.join(train, config.id_column, sorted(columns))
    model = trainer.accelerator.unwrap_model(trainer.model)
    if job.method == "sft" and not job.target and config.world_size == 1:
        report = attribute_tokens(
            report,
            model,
            train,
            targets_of(job, splits),
            k=job.top,
            args=config,
            processing_class=trainer.processing_class,
        )
    report.save_to_disk(trainer.private_dir / "report")  # first: a terminal may have no μ to print
    return tell(job, config.output_dir, report, check, trainer.private_dir)


def training_rows(
    job: InfluenceJob | AttributeJob, splits: DatasetDict, id_column: str, seed: int
) -> tuple[Dataset, str | None]:
    """The rows whose influence is asked for, each with an id, and the column that says which are known to be at fault.

    Raises:
        ValueError: a column that is not there, or of another kind.
    """
    train = one_split(splits, "split", job.split)
    if id_column not in train.column_names:
        train = train.add_column(id_column, list(range(len(train))))
    if job.wrong_labels:
        train = with_wrong_labels(train, job.wrong_labels, seed=seed)
    check = job.check_column or ("wrong" if job.wrong_labels else None)
    check_column(train, "check_column", check, ("bool", "int", "uint"))
    check_column(train, "group_column", job.group_column, ("bool", "int", "uint", "string", "large_string"))
    return train, check


def _model(job: InfluenceJob, config: FINEArguments, train: Dataset) -> tuple[Any, Any]:
    if job.model == "digits":
        from ..examples.classifier import digits_model, digits_processor

        return digits_model(config.seed), digits_processor()
    if job.model == "opinions":
        from ..examples.opinions import opinion_llama, texts_of, train_tokenizer

        try:
            tokenizer = train_tokenizer(texts_of(train))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"dataset: {job.dataset!r} does not fit model: opinions, which learns columns prompt and completion that hold "
                "messages"
            ) from error
        return opinion_llama(tokenizer, seed=config.seed), tokenizer
    with loading("model", job.model, "a model"):
        AutoConfig.from_pretrained(job.model)
    model, processing_class, _ = load_model(job.model, config, None, any_head=True)
    return model, processing_class


def check_column(train: Dataset, key: str, column: str | None, kinds: tuple[str, ...]) -> None:
    if column is None:
        return
    if column not in train.column_names:
        raise ValueError(f"{key}: {column!r} is not in the dataset (it has {', '.join(train.column_names)})")
    if column in COLUMNS:
        raise ValueError(f"{key}: the report has a column {column!r} of its own; rename the dataset's")
    kind = str(getattr(train.features[column], "dtype", type(train.features[column]).__name__))
    if not kind.startswith(kinds):
        raise ValueError(f"{key}: {column!r} holds {kind}; it has to be {', '.join(kinds[:-1])} or {kinds[-1]}")


def targets_of(job: InfluenceJob | AttributeJob, splits: DatasetDict) -> Dataset:
    if job.target_split:
        rows = one_split(splits, "target_split", job.target_split)
    else:
        loaded = load(job.target_dataset, argument="target_dataset")
        one = len(loaded) == 1
        rows = next(iter(loaded.values())) if one else one_split(loaded, "target_dataset: split", job.split)
    if job.target_column:
        if job.target_column not in rows.column_names:
            raise ValueError(
                f"target_column: {job.target_column!r} is not in the target rows (they have {', '.join(rows.column_names)})"
            )
        if job.target_column != "target":
            values, feature = rows.with_format(None)[job.target_column][:], rows.features[job.target_column]
            rows = rows.remove_columns("target") if "target" in rows.column_names else rows
            rows = rows.add_column("target", values, feature=feature)
    return rows


def shown_column(train: Dataset) -> str | None:
    """What tells a reader which example it is."""
    return next((name for name in ("image", "text", "completion") if name in train.column_names), None)


def tell(
    job: InfluenceJob | AttributeJob, trained: str | None, report: InfluenceReport, check: str | None, private: Path
) -> dict[str, Any]:
    """Print what a report says, draw its pictures, and say where things are; `trained` is the folder of a model that was trained for it."""
    out, figures = console(), []
    out.print(report.summary(job.top), markup=True)  # which escapes what it shows
    pictures, label = [], data.label_column(report.dataset)
    for number, target in enumerate(report.targets[:10]):
        word = re.sub(r"[^\w-]+", "_", target)[:50]  # a target may be called anything, "a/b" too
        name = f"{number}_{word}" if len(report.targets) > 1 else "influence"
        faulty = None
        if check is not None:
            rows = report.select(target=target)
            marked, mu = np.array(rows[check][:], dtype=bool), np.nan_to_num(np.array(rows["mu"][:]), nan=-np.inf)
            looked = max(1, round(INSPECTED * len(mu)))
            ranked = (marked & np.isfinite(mu))[np.argsort(-mu, kind="stable")]
            found, other = ranked[:looked].sum(), ranked[np.isfinite(mu).sum() - looked : np.isfinite(mu).sum()].sum()
            figures.append(
                {
                    "target": target,
                    "column": check,
                    "rows": marked.sum(),
                    "looked_at": looked,
                    "found": found,
                    "opposite": other,
                }
            )
            faulty = [value for value, hit in zip(rows["sample_id"][:], marked, strict=True) if hit]
            out.print(
                f"{target}: {found} of {marked.sum()} rows with {check} ({100 * (found / max(1, marked.sum())):.0f} %) among the {looked} "
                f"examples with the largest μ ({100 * INSPECTED:.0f} %), {other} among those with the smallest",
                markup=False,
            )
            if target == "self" and np.isfinite(report.observations.mean_margin()).any():
                suspects = report.suspects(looked)
                hits = int(np.array(suspects[check][:], dtype=bool).sum())
                figures[-1]["found_by_margin"] = hits
                out.print(
                    f"{target}: {hits} of them among the {looked} with the lowest margin (report.suspects(), which is for wrong labels)",
                    markup=False,
                )
        pictures.append(report.plot(private / "plots" / f"{name}_ranked.png", target=target, highlight=faulty))
        if "image" in report.dataset.column_names:
            path = private / "plots" / f"{name}_top.png"
            pictures.append(report.plot(path, "examples", target=target, k=24, caption_column=label))
        if job.group_column and target != "self":
            groups = report.group(job.group_column, target)
            for row in groups:
                out.print(
                    f"{target} {job.group_column}={row['group']}: μ {row['mu']:+.2f} [{row['mu_low']:+.2f}, {row['mu_high']:+.2f}], "
                    f"{row['n_examples']} examples",
                    markup=False,
                )
                figures.append(
                    {"target": target, "column": job.group_column}
                    | {key: row[key] for key in ("group", "mu", "mu_low", "mu_high", "n_examples")}
                )
            path = private / "plots" / f"{name}_groups.png"
            pictures.append(report.plot(path, "groups", target=target, by=job.group_column))
    page = report.to_html(private / "report.html", job.top)
    model = f"\nmodel    {trained}" if trained else ""
    out.print(f"{model}\nreport   {private / 'report'} (tells of the training data: never pushed)", markup=False)
    out.print(f"page     {page}", markup=False)
    out.print(f"plots    {pictures[0].parent} ({len(pictures)})\n\nOpen it:\n", markup=False)
    folder = private / "report"
    show_code(["from hf_unlearn import InfluenceReport", f'report = InfluenceReport.load_from_disk("{folder}")'])
    return {
        "figures": figures,
        "targets": [*report.targets],
        "places": {"report": folder, "page": page, "plots": pictures},
    }
