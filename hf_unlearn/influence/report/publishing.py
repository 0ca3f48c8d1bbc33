"""How an influence report comes to the Hub: μ of every example as a dataset, with a card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ...hub.allowed import CARD
from ...hub.objects import Written, check_options
from ...hub.provenance import hardware, library_versions
from ...hub.record import other_record, write_record
from ...hub.text import all_tags, line
from .unit import said_of


TEMPLATE = Path(__file__).with_name("card.md.jinja")
# Name, title and paper, by observation; of all others f-INE's.
FINE = ("f-ine", "f-INE", "2510.10510")
OTHERS = {
    "finished": ("ek-fac", "influence functions with EK-FAC", "2308.03296"),
    "segments": ("source", "SOURCE", "2405.12186"),
}
DATA = "data/train-00000-of-00001.parquet"
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


class PublishedReport:
    """The part of [`~hf_unlearn.InfluenceReport`] that [`~hf_unlearn.publish`] asks."""

    def _check_audit(self, audit: Any) -> None:
        raise ValueError("audit: is of an unlearned model, and this is an influence report; leave it out")

    @contextmanager
    def _written(
        self, repo_id: str, audit: Any, *, token: str | bool | None, columns: Sequence[str] = (), **options: Any
    ) -> Iterator[Written]:
        check_options(self, options, ("license", "language", "tags", "datasets"))
        columns = [columns] if isinstance(columns, str) else list(columns)
        for name in columns:
            if name not in self._joined:
                raise ValueError(
                    f"columns: {name!r} is not joined to the report (it has {', '.join(self._joined) or 'none'})"
                )
        left = [name for name in self._joined if name not in columns]
        with TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (folder / DATA).parent.mkdir()
            self.dataset.remove_columns(left).to_parquet(folder / DATA)
            (folder / CARD).write_text(self.dataset_card(repo_id, columns=columns, **options), encoding="utf-8")
            write_record(self._record(), folder, [CARD, DATA])
            yield Written(folder, (), "Upload influence report", left_out=_of_columns(left), repo_type="dataset")

    def _record(self) -> dict[str, Any]:
        about = self.manifest
        config = {
            name: about[name] for name in ("targets", "observation", "optimizer", "steps", "settings") if name in about
        }
        config |= {"scale": self.scale, "burn_in": self.burn_in, "confidence": self.confidence}
        method = dict(zip(("name", "title", "arxiv"), OTHERS.get(about.get("observation"), FINE), strict=True))
        return other_record("influence report", method=method, config=config, seed=about.get("seed"))

    def dataset_card(
        self,
        repo_id: str,
        *,
        columns: Sequence[str] = (),
        license: str | None = None,
        language: str | Sequence[str] | None = None,
        tags: str | Sequence[str] = (),
        datasets: str | Sequence[str] | None = None,
    ) -> str:
        """README.md of the report as a dataset.

        Args:
            repo_id (`str`): where to.
            columns (`Sequence[str]`, defaults to `()`): joined columns that go with it.
            license, language, tags (*optional*): metadata.
            datasets (`str` or `Sequence[str]`, *optional*): ids on the Hub of the training data that the report is about.
        """
        from huggingface_hub import DatasetCard, DatasetCardData

        about, count = self.manifest, len(self.observations.sample_ids)
        sources = [datasets] if isinstance(datasets, str) else list(datasets or ())
        rows = len(self.dataset)
        data = DatasetCardData(
            license=license,
            language=language or None,
            tags=all_tags(["hf_unlearn", "influence"], tags),
            source_datasets=sources or None,
            size_categories=next((name for limit, name in SIZES if rows < limit), "n>1M"),
            configs=[{"config_name": "default", "data_files": [{"split": "train", "path": DATA}]}],
        )
        targets = []
        for name in self.targets:
            mu = self._values("mu", name)
            seen, finite = np.isfinite(mu), mu[np.isfinite(mu)]
            quantiles = [f"{value:.3g}" for value in np.quantile(finite, (0.0, 0.5, 1.0))] if seen.any() else ["–"] * 3
            found = [len(self.discoveries(0.05, name, side=side)) for side in ("helpful", "harmful")]
            targets.append(
                [
                    line(name),
                    f"{self.sigma[name]:.3g}" if np.isfinite(self.sigma[name]) else "–",
                    f"{seen.sum():,}",
                    *quantiles,
                    *map(str, found),
                ]
            )
        _, by, paper = OTHERS.get(about.get("observation"), FINE)
        card = DatasetCard.from_template(
            data,
            template_path=str(TEMPLATE),
            title=line(repo_id.split("/")[-1]),
            count=f"{count:,}",
            sources=", ".join(f"[{line(one)}](https://huggingface.co/datasets/{one})" for one in sources),
            observed=line(about.get("observation", "not named")),
            unit=said_of(self.manifest),
            order_only=self.order_only,
            by=by,
            paper=paper,
            targets=targets,
            columns=[line(name) for name in columns],
            confidence=f"{100 * self.confidence:g}",
            snippet=f'from datasets import load_dataset\n\nmu = load_dataset("{repo_id}", split="train")\nprint(mu.sort("mu")[:5]["sample_id"])',
            settings=[
                (name, line(about[name]))
                for name in ("observation", "optimizer", "steps", "seed")
                if about.get(name) is not None
            ]
            + [("scale", f"{self.scale:g}"), ("burn_in", self.burn_in)],
            own_loss="self" in self.targets,
            hardware=hardware(),
            run=line(about.get("run_id", "not known")),
            versions=", ".join(f"{name} {number}" for name, number in library_versions().items()),
        )
        return card.content.rstrip() + "\n"


def _of_columns(names: Sequence[str]) -> dict[str, str]:
    return {f"column {name}": "of the training data; columns= publishes it" for name in names}
