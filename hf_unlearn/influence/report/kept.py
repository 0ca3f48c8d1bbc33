"""An influence report in a folder, and out of one: its own, or that of the run that observed it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ...files import PRIVATE, kept_private
from .records import MANIFEST, read_observations, write_observations


if TYPE_CHECKING:
    from typing import Self

    from .observations import Observations


MARKER = "report.json"
FORMAT = 1
TOKENS = "tokens"
RECORDS = "influence"  # folder of a run's records, in its private one


class Kept:
    """The part of [`~hf_unlearn.InfluenceReport`] that is written and read."""

    @classmethod
    def from_run(cls, output_dir: str | Path, *, confidence: float = 0.95) -> Self:
        """The report of a run that has ended, or was stopped or killed: of all steps whose records are there.

        It needs neither the model nor the trainer. A run with `observation="propagated"` has records when its sweep has ended.

        Args:
            output_dir (`str` | `Path`): of the run, as its config had it.
            confidence (`float`, defaults to 0.95): of intervals, in (0, 1).

        Raises:
            ValueError: there are no records, or none of a step.
        """
        folder = Path(output_dir, PRIVATE, RECORDS)
        if not (folder / MANIFEST).is_file():
            raise ValueError(
                f"output_dir={str(output_dir)!r}: holds no records of an influence run ({PRIVATE}/{RECORDS}); give the output_dir of one"
            )
        observations, manifest = read_observations(folder)
        return cls.from_observations(
            observations,
            manifest,
            burn_in=burnt_in(manifest.get("burn_in", 0.0), observations),
            scale=manifest.get("scale", 1.0),
            confidence=confidence,
        )

    def save_to_disk(self, folder: str | Path) -> None:
        """Write dataset, observations, manifest and tokens into a folder that is complete or not there.

        A report that is there is replaced.

        Raises:
            ValueError: the folder holds something else.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / MARKER).is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"folder={str(folder)!r}: holds something else than a report; choose another one")
        partial, old = (folder.with_name(f"{folder.name}.{state}") for state in ("partial", "old"))
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        with kept_private(partial):
            self.dataset.save_to_disk(partial / "dataset")
            if self.token_rows is not None:
                self.token_rows.save_to_disk(partial / TOKENS)
            manifest = {**self.manifest, "targets": list(self.targets)}
            write_observations(partial / "observations", self.observations, manifest)
            settings = {"scale": self.scale, "burn_in": self.burn_in, "confidence": self.confidence}
            about = {"format": FORMAT, **settings, "manifest": self.manifest}
            (partial / MARKER).write_text(json.dumps(about, indent=2))
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)

    @classmethod
    def load_from_disk(cls, folder: str | Path) -> Self:
        """What [`~InfluenceReport.save_to_disk`] wrote into `folder`; needs neither the model nor the trainer.

        Raises:
            ValueError: there is no report, or one of another version of this file.
        """
        import datasets

        folder = Path(folder)
        if not (folder / MARKER).is_file():
            raise ValueError(f"folder={str(folder)!r}: holds no influence report (no {MARKER})")
        settings = json.loads((folder / MARKER).read_text())
        if settings.pop("format", None) != FORMAT:
            raise ValueError(f"folder={str(folder)!r}: has another format, this version reads {FORMAT}")
        observations, _ = read_observations(folder / "observations")
        tokens = datasets.load_from_disk(folder / TOKENS) if (folder / TOKENS).is_dir() else None
        return cls(datasets.load_from_disk(folder / "dataset"), observations, **settings, token_rows=tokens)


def burnt_in(share: float, observations: Observations) -> int:
    """The first step that counts: a share of the steps that were taken, as a run may be stopped early. The last one always counts."""
    last = int(max(observations.steps.step, default=0))
    return min(round(share * (last + 1)), last)
