"""What an audit found: frozen, as a table, as JSON, as entries for the Hub, as a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import read_json, write_json
from ..hub.card import Figure
from .findings import AuditFindings
from .residual import ResidualMu
from .result import CheckResult, bare, readings_of
from .verdict import Verdict


if TYPE_CHECKING:
    from huggingface_hub import EvalResult, EvalResultEntry
    from pandas import DataFrame
    from rich.table import Table


FORMAT = 1  # of the JSON file
MEASURED = ("residual", "results")  # of its values: hold numbers that may be infinite


@dataclass(frozen=True)
class AuditReport(AuditFindings):
    """What [`audit`][hf_unlearn.audit.run.audit] found, as a table, as files, and for the Hub. Arguments as for [`AuditFindings`]."""

    def __str__(self) -> str:
        return f"AuditReport({self.verdict}; {len(self.results)} checks)"

    # As a table

    def to_pandas(self) -> DataFrame:
        """A row a check: values of all models, distance, interval, margin, status, examples, seconds; over training seeds, where they were
        repeated, mean, standard deviation and the parts of the variance.
        """
        from pandas import DataFrame

        rows = []
        for one in self.results:
            row = {name: getattr(one, name) for name in ("name", "layer", "unit", "audited", "original")}
            row |= {f"retrained_{number + 1}": value for number, value in enumerate(one.retrained)}
            row |= {
                name: getattr(one, name)
                for name in ("distance", "low", "high", "stated", "margin", "status", "sees", "n", "seconds", "paper")
            }
            parts = ("mean", "sd", "training", "unlearning", "evaluation")
            row |= {f"over_seeds_{part}": one.over_seeds[part] for part in parts} if one.over_seeds else {}
            rows.append(row)
        return DataFrame(rows)

    def summary(self) -> Table:
        """For the terminal; shares in percent."""
        from rich import box
        from rich.table import Table

        table = Table(
            title=str(self.verdict),
            title_justify="left",
            caption=self.residual.in_words(),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for heading in ("check", "audited", "original", "retrained", "distance", "margin", ""):
            left = heading in ("check", "")
            table.add_column(
                heading, justify="left" if left else "right", min_width=18 if heading == "check" else None
            )
        for one in self.results:
            mean = sum(one.retrained) / len(one.retrained) if one.retrained else None
            low, high = (bare(value, one.unit, signed=True) for value in (one.low, one.high))
            values = (bare(value, one.unit) for value in (one.audited, one.original, mean))
            table.add_row(
                one.name,
                *values,
                f"{low} … {high}" if one.low is not None else "–",
                bare(one.margin, one.unit),
                one.status,
            )
        return table

    # As files

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a number that JSON has no word for, as `inf`, is a text."""
        values = {"format": FORMAT, **asdict(self)}
        return values | {name: _mapped(values[name], _as_text) for name in MEASURED}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AuditReport:
        """The report of `values` that [`to_dict`] gave.

        Raises:
            ValueError: of another format.
        """
        if values.get("format") != FORMAT:
            raise ValueError(f"format={values.get('format')!r}: this version reads {FORMAT}; make the report anew")
        values = {name: value for name, value in values.items() if name != "format"}
        values |= {name: _mapped(values[name], _as_number) for name in MEASURED}
        values["verdict"] = Verdict(**values["verdict"] | {"needs": tuple(values["verdict"]["needs"])})
        values["residual"] = ResidualMu(
            **values["residual"] | {"retrained_loss": tuple(values["residual"]["retrained_loss"])}
        )
        values["results"] = tuple(
            CheckResult(**one | {"readings": readings_of(one["readings"])}) for one in values["results"]
        )
        return cls(**values)

    def save(self, path: str | Path) -> Path:
        """Write a JSON file to `path`.

        Raises:
            ValueError: the name does not end in `.json`.
        """
        path = Path(path)
        if path.suffix != ".json":
            raise ValueError(f"path={str(path)!r}: must end in .json")
        write_json(self.to_dict(), path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> AuditReport:
        """Read what [`save`] wrote to `path`.

        Raises:
            ValueError: the file is missing, damaged, or no report.
        """
        try:
            return cls.from_dict(read_json(path))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: is no audit report ({error})") from error

    def check_is_of(self, model: Any) -> None:
        """Refuse a report of another model than `model`.

        Raises:
            ValueError: the weights are not those that were audited.
        """
        from .digests import digest_of

        if digest_of(model) != self.model_digest:
            raise ValueError("audit: is of another model than this one (their weights differ); audit this one")

    # For the Hub

    @property
    def passed(self) -> bool:
        """Whether the verdict is `"forgotten"`."""
        return self.verdict.word == "forgotten"

    def to_figures(self) -> list[Figure]:
        """Of a card: every check before, after, and the mean of retrained models."""
        found = []
        for one in self.results:
            scale = 100 if one.unit == "%" else 1
            retrained = scale * sum(one.retrained) / len(one.retrained) if one.retrained else None
            before = None if one.original is None else scale * one.original
            found.append(
                Figure(
                    metric=one.name,
                    name=one.title,
                    after=scale * one.audited,
                    before=before,
                    retrained=retrained,
                    split="audit",
                    unit=one.unit,
                )
            )
        return found

    def to_eval_results(
        self, *, dataset_type: str = "unknown", dataset_name: str = "unknown", task: str = "other"
    ) -> list[EvalResult]:
        """Entries of a card's `model-index`: the audited model's value in every check, and residual μ.

        Args:
            dataset_type, dataset_name (`str`, defaults to `"unknown"`): of the data: its id on the Hub, and what readers call it.
            task (`str`, defaults to `"other"`): as in `"image-classification"`.
        """
        from huggingface_hub import EvalResult

        kind = {"task_type": task, "dataset_type": dataset_type, "dataset_name": dataset_name}
        found = [
            EvalResult(
                **kind,
                metric_type=one.name,
                metric_name=f"{one.title} ({one.layer})",
                metric_value=one.audited * (100 if one.unit == "%" else 1),
            )
            for one in self.results
        ]
        if self.residual.mu is not None and math.isfinite(self.residual.mu):
            found.append(
                EvalResult(**kind, metric_type="residual_mu", metric_name="Residual μ", metric_value=self.residual.mu)
            )
        return found

    def to_eval_entries(self, dataset_id: str, task_id: str = "unlearning-audit") -> list[EvalResultEntry]:
        """Entries of the Hub's `.eval_results/*.yaml`, as `eval_result_entries_to_yaml` takes them: a task a check.

        Args:
            dataset_id (`str`): of the data on the Hub.
            task_id (`str`, defaults to `"unlearning-audit"`): what the names of the checks come after.
        """
        from huggingface_hub import EvalResultEntry

        return [
            EvalResultEntry(
                dataset_id=dataset_id,
                task_id=f"{task_id}.{one.name}",
                value=one.audited * (100 if one.unit == "%" else 1),
                date=self.created,
                notes=f"{one.status}; {one.in_words()}. Verdict: {self.verdict.word}",
            )
            for one in self.results
        ]

    # To look at

    def plot(self, path: str | Path) -> Path:
        """One page: the verdict, every check beside its margin, recovery curves. A PNG file, at `path`."""
        from .page import picture

        return picture(self, path)

    def to_html(self, path: str | Path, drawn: str | Path | None = None) -> Path:
        """A page that needs no other file, at `path`; `drawn` is what [`plot`] made, if it is there."""
        from .page import page

        return page(self, path, drawn)


NOT_IN_JSON = {str(value): value for value in (math.inf, -math.inf)}


def _mapped(values: Any, change: Callable[[Any], Any]) -> Any:
    """Nested mappings and sequences with every other value changed."""
    if isinstance(values, Mapping):
        return {name: _mapped(value, change) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(_mapped(value, change) for value in values)
    return change(values)


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _as_number(value: Any) -> Any:
    return NOT_IN_JSON.get(value, value) if isinstance(value, str) else value
