"""The job of `hf-unlearn influence` with `method: attribute`: a model that is already trained is asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from .. import data
from ..examples.datasets import load
from ..examples.named import LANGUAGE
from ..files import PRIVATE, loading, read_json
from ..influence.attribution import attribute
from ..influence.config import FINEConfig, InfluenceConfig
from ..influence.index import MANIFEST, InfluenceIndex
from ..influence.tokens import attribute_tokens
from ..training.models import is_causal_lm, load_model
from .alone import made_once
from .influence import shown_column, targets_of, tell, training_rows


if TYPE_CHECKING:
    from datasets import Dataset

    from ..influence.report.report import InfluenceReport
    from .recipe.attribute import AttributeJob


def run_attribute(job: AttributeJob) -> dict[str, Any]:
    """Ask, save the report, and say where things are.

    Raises:
        ValueError: something in the recipe does not fit the model or the data; nothing was written.
    """
    splits = load(job.dataset, revision=job.dataset_revision)
    train, check = training_rows(job, splits, job.id_column, job.seed)
    targets = None if job.target else targets_of(job, splits)
    report = _report(job, train, targets)
    private = Path(job.output_dir, PRIVATE)
    columns = {check, job.group_column, data.label_column(train), shown_column(train)} - {None}
    report = report.join(train, job.id_column, sorted(columns))
    report.save_to_disk(private / "report")
    return tell(job, None, report, check, private)


def _report(job: AttributeJob, train: Dataset, targets: Dataset | None) -> InfluenceReport:
    name = made_once(None, job.model) if job.model in ("digits", *LANGUAGE) else job.model
    is_adapter = Path(name, "adapter_config.json").is_file()
    if not is_adapter:
        with loading("model", name, "a model"):
            AutoConfig.from_pretrained(name)
    config = {
        "output_dir": job.output_dir, "report_to": "none", "per_device_eval_batch_size": job.batch_size, "layers": job.layers,
        "id_column": job.id_column, "seed": job.seed, "use_cpu": job.use_cpu, "max_grad_norm": job.max_grad_norm,
    }  # fmt: skip
    model, processing_class = name, None
    args: Any = InfluenceConfig(**config)
    if not is_adapter:
        model, processing_class, _ = load_model(name, args, None, any_head=True)
    if is_adapter or is_causal_lm(model):
        args = FINEConfig(**config, **({"max_length": job.max_length} if job.max_length else {}))
    given = {"args": args, "processing_class": processing_class}
    report = _asked(job, model, train, targets, given)
    if targets is None or isinstance(args, InfluenceConfig):
        return report
    return attribute_tokens(report, model, train, targets, k=job.top, damping=job.damping, **given)


def _asked(
    job: AttributeJob, model: Any, train: Dataset, targets: Dataset | None, given: dict[str, Any]
) -> InfluenceReport:
    if job.index_dir:
        if Path(job.index_dir, MANIFEST).is_file() and _is_whole(job.index_dir):
            index = InfluenceIndex.load(job.index_dir, model, **given)
        else:
            index = InfluenceIndex.build(
                model, train, job.index_dir, projection=job.projection, damping=job.damping,
                curvature_examples=job.curvature_examples, **given,
            )  # fmt: skip
        if index.sample_ids != list(train.with_format(None)[job.id_column]):
            raise ValueError(
                f"index_dir: {job.index_dir!r} is of other rows than {job.dataset!r}; choose another folder"
            )
        return index.query(targets)
    return attribute(
        model, train, targets, target=job.target, checkpoints=job.checkpoints_folder, damping=job.damping,
        curvature_examples=job.curvature_examples, **given,
    )  # fmt: skip


def _is_whole(folder: str) -> bool:
    return bool(read_json(Path(folder, MANIFEST)).get("complete"))
