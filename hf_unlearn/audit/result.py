"""One check's result: what it found in each model, and how far the audited one is from retrained ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .check import Layer, Reading, Readings
from .equivalence import Status


@dataclass(frozen=True)
class CheckResult:
    """One check: what it found in each model, and how far the audited one is from retrained ones.

    Args:
        name, title, unit, layer, paper, what, settle: see [`Check`].
        stated (`float`): the margin that was stated.
        readings ([`Readings`]): of all the models, with values by example, so that whoever has the file can judge anew.
        distance, low, high, margin, status, sees: see [`Comparison`].
        over_seeds (`dict`, *optional*): what repeated trainings and unlearnings found: `mean` and `sd` of one audit, its variance in the parts `training`,
            `unlearning` and `evaluation`, and `values` `[trainings, unlearnings, evaluations]`. It decides nothing.
    """

    name: str
    title: str
    unit: str
    layer: Layer
    paper: str | None
    what: str
    stated: float
    readings: Readings
    distance: float | None
    low: float | None
    high: float | None
    margin: float | None
    status: Status
    sees: bool | None
    settle: str | None = None
    over_seeds: Mapping[str, Any] | None = None

    @property
    def audited(self) -> float:
        return self.readings.audited.value

    @property
    def original(self) -> float | None:
        return None if self.readings.original is None else self.readings.original.value

    @property
    def retrained(self) -> tuple[float, ...]:
        return tuple(one.value for one in self.readings.retrained)

    @property
    def n(self) -> int:
        return self.readings.audited.n

    @property
    def seconds(self) -> float:
        """Of all models together."""
        every = [self.readings.audited, *self.readings.of("original"), *self.readings.retrained]
        return sum(one.seconds for one in every)

    def shown(self, value: float | None, *, signed: bool = False) -> str:
        """A value in the check's unit."""
        return shown(value, self.unit, signed=signed)

    def in_words(self) -> str:
        """The number that a verdict prints."""
        text = self.shown(self.audited)
        if self.retrained:
            text += f", retrained {self.shown(sum(self.retrained) / len(self.retrained))}"
        if self.distance is None:
            return text
        return f"{text}; distance {self.shown(self.distance, signed=True)} [{self.shown(self.low, signed=True)}, {self.shown(self.high, signed=True)}], margin {self.shown(self.margin)}"


def readings_of(values: Mapping[str, Any]) -> Readings:
    """From JSON values."""
    original = None if values["original"] is None else reading_of(values["original"])
    return Readings(reading_of(values["audited"]), original, tuple(map(reading_of, values["retrained"])))


def reading_of(values: Mapping[str, Any]) -> Reading:
    """From JSON values."""
    arrays = {name: tuple(values[name]) for name in ("per_example", "per_other") if values.get(name) is not None}
    return Reading(**dict(values) | arrays)


def shown(value: float | None, unit: str, *, signed: bool = False) -> str:
    """A value with its unit; shares as percentages."""
    return bare(value, unit, signed=signed) + (f" {unit}" if unit and value is not None else "")


def bare(value: float | None, unit: str, *, signed: bool = False) -> str:
    """The same without the unit."""
    if value is None:
        return "–"
    sign = "+z" if signed else "z"  # no −0.0
    if unit == "%":
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.2f}" if abs(value) < 100 else f"{value:{sign}.2g}"
