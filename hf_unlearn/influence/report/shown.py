"""What of an influence report is looked at: a table for the terminal, and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ... import plots
from ...data import value_name
from ...tradeoff.curve import TradeOff
from ...tradeoff.estimate import MIN_OBSERVATIONS, Method
from .groups import Groups, gains_with_and_without, group_mu, positions_of
from .publishing import PublishedReport
from .tokens import TokenScores, tokens_in
from .unit import said_of, signed


if TYPE_CHECKING:
    from typing import Self

    from datasets import Dataset
    from rich.table import Table


Plot = Literal["ranked", "groups", "tradeoff", "examples"]
SHORT = ("bool", "string", "large_string", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))


class Shown(PublishedReport):
    """The half of [`~hf_unlearn.InfluenceReport`] that people look at; the other half is what it looks at."""

    def __repr__(self) -> str:
        steps, rows = len(self.observations.steps.step), len(self.observations.step)
        names = ", ".join(self.targets[:5]) + (", …" if len(self.targets) > 5 else "")
        return (
            f"InfluenceReport(run {self.manifest.get('run_id', '?')}: {len(self.observations.sample_ids):,} examples, "
            f"targets {names}; {rows:,} observations in {steps:,} steps, burn_in={self.burn_in}, scale={self.scale:g})"
        )

    def summary(self, k: int = 10, target: str | Sequence[str] | None = None) -> Table:
        """The k most helpful and the k most harmful examples of each target, for the terminal.

        Args:
            k (`int`, defaults to 10): at least 1.
            target (`str` or list of `str`, *optional*): all targets if left out.
        """
        from rich.markup import escape
        from rich.table import Table

        targets = self._some_targets(target)
        features = self.dataset.features
        joined = [name for name in self._joined if getattr(features[name], "dtype", None) in SHORT]
        interval = f"{100 * self.confidence:.0f} % interval"
        unseen = self.manifest.get("unseen") or {}
        missed = f" {100 * unseen['share']:.1f} % of the trainable parameters were not seen." if unseen else ""
        table = Table(
            title=f"Influence, run {escape(str(self.manifest.get('run_id', '?')))}",
            caption=f"μ > 0 helps, < 0 harms. {said_of(self.manifest)}"
            f"{'; intervals cover the noise of the estimate alone' if self.order_only else ''}. No privacy guarantee.{missed}",
        )
        for header in ("target", "sample", "μ", interval, "z", "seen", *joined):
            table.add_column(escape(header), justify="right" if header in ("μ", "z", "seen", interval) else "left")
        for name in targets:
            half = min(k, -(-len(self.observations.sample_ids) // 2))  # no example is shown twice
            for harmful in (False, True):
                k_shown = half if not harmful else min(k, len(self.observations.sample_ids) - half)
                shown = list(self.top(k_shown, name, harmful)) if k_shown else []
                for row in reversed(shown) if harmful else shown:
                    extra = [_shown(row[column], features[column]) for column in joined]
                    cells = [name, str(row["sample_id"]), signed(row["mu"])]
                    low, high = signed(row["mu_low"]), signed(row["mu_high"])
                    cells += ["–" if "–" in (low, high) else f"{low} … {high}", signed(row["z"], ".1f")]
                    table.add_row(*map(escape, [*cells, str(row["n_observations"]), *extra]))
                table.add_section()
        return table

    def tokens(self, sample_id: Any, target: str | None = None) -> TokenScores:
        """Which tokens of an example taught a target.

        Args:
            sample_id: of an example whose tokens were looked at by [`attribute_tokens`].
            target (`str`, *optional*): may be left out where there is one.

        Raises:
            ValueError: no such target, several to choose from, or the tokens are not known.
        """
        return tokens_in(self.token_rows, sample_id, self._one_target(target))

    def with_tokens(self, rows: Dataset) -> Self:
        """The report with what [`attribute_tokens`] found: `sample_id`, `target`, `piece`, `score`, a row for each example and target."""
        return replace(self, token_rows=rows)

    def to_html(self, path: str | Path, k: int = 10, target: str | Sequence[str] | None = None) -> Path:
        """One page that needs no other file: the k most helpful and the k most harmful examples of each target, with the columns that were
        joined, pictures and texts among them, and texts shaded by token where [`attribute_tokens`] has looked. It shows training data.

        Args:
            path: where it goes.
            k (`int`, defaults to 10): at least 1.
            target (`str` or list of `str`, *optional*): all targets if left out.

        Raises:
            ValueError: k below 1, or no such target.
        """
        from .page import page

        if k < 1:
            raise ValueError(f"k={k!r}: must be at least 1")
        return page(self, path, self._some_targets(target), k)

    def plot(
        self,
        path: str | Path,
        kind: Plot = "ranked",
        *,
        target: str | None = None,
        by: Groups | None = None,
        method: Method = "accumulated",
        highlight: Iterable[Any] | None = None,
        k: int = 12,
        harmful: bool = False,
        image_column: str = "image",
        caption_column: str | None = None,
    ) -> Path:
        """A picture, as a PNG file.

        Args:
            path: where it goes.
            kind (`str`, defaults to `"ranked"`): `"ranked"`: μ of all examples by rank, those in `highlight` marked;
                `"groups"`: μ of the groups in `by` as bars; `"tradeoff"`: for each group in `by` the trade-off curve
                between its steps' gains with and without it, and the Gaussian one beside it; `"examples"`: pictures
                of the `k` examples at the `top`.
            target (`str`, *optional*): may be left out where there is one.
            by, method: see [`~InfluenceReport.group`]. `method` is for `"groups"`.
            highlight (*optional*): sample ids.
            k (`int`, defaults to 12), harmful (`bool`, defaults to `False`): see [`~InfluenceReport.top`].
            image_column (`str`, defaults to `"image"`), caption_column (`str`, *optional*): joined columns.

        Raises:
            ValueError: no such kind, `by` missing, no such column, or what `top` and `group` refuse.
        """
        if kind not in get_args(Plot):
            raise ValueError(f"kind={kind!r}: must be one of {', '.join(map(repr, get_args(Plot)))}")
        if kind in ("groups", "tradeoff") and by is None:
            raise ValueError(f"by: kind={kind!r} shows groups; pass a joined column, a mapping or sample ids")
        target = self._one_target(target)
        if kind == "ranked":
            marked = np.zeros(len(self.observations.sample_ids), dtype=bool)
            marked[positions_of([] if highlight is None else highlight, self._position, "highlight")] = True
            columns = (self._values(name, target) for name in ("mu", "mu_low", "mu_high"))
            label = f"on {target!r}"
            return plots.ranked_mu(*columns, path, highlight=marked, label=label, confidence=self.confidence)
        if kind == "groups":
            found = self.group(by, target, method).with_format("numpy")[:]
            return plots.group_bars(
                found["group"].tolist(), found["mu"], found["mu_low"], found["mu_high"], path, label=f"on {target!r}"
            )
        if kind == "tradeoff":
            return self._plot_tradeoff(path, target, by)
        rows = self.top(k, target, harmful)
        for column in (image_column, caption_column):
            if column is not None and column not in rows.column_names:
                raise ValueError(f"column {column!r}: is not in the report; attach it with join()")
        captions = [
            f"{row['sample_id']}\nμ = {signed(row['mu'])}"
            + (
                f"\n{caption_column}: {_shown(row[caption_column], rows.features[caption_column])}"
                if caption_column
                else ""
            )
            for row in rows.remove_columns(image_column)
        ]
        return plots.image_grid(list(rows[image_column]), captions, path)

    def _plot_tradeoff(self, path: str | Path, target: str, by: Groups) -> Path:
        names, members = self._members(by)
        column = self.targets.index(target)
        fitted, _ = group_mu(
            self._used, members, [column], "gaussian", scale=self.scale, confidence=self.confidence, n_resamples=1,
            block_length=None, seed=0,
        )  # fmt: skip
        curves, gains = {}, gains_with_and_without(self._used, members, column)
        for name, (gain, without) in zip(names, gains, strict=True):
            if len(gain) < MIN_OBSERVATIONS:
                raise ValueError(f"group {name!r}: is in {len(gain)} steps; a curve needs at least {MIN_OBSERVATIONS}")
            curve = TradeOff.from_samples(-gain, -without)
            curves[name] = curve.alpha, curve.beta
        return plots.tradeoff_curve(curves, path, mu=dict(zip(names, fitted[:, 0, 0].tolist(), strict=True)))


def _shown(value: Any, feature: Any) -> str:
    text = "" if value is None else value_name(value, feature)
    return text if len(text) <= 40 else text[:39] + "…"
