"""What was lost beside: how far draws of everything else are from real images, and which neighbours gave way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...metrics.features import Features
from ...metrics.generation import class_shift, density_coverage, frechet_distance, kernel_distance
from ..check import AmongRetrained, Check, Reading, Readings, Role, against_others
from .data import GeneratorData
from .subject import GeneratorSubject


FEWEST = 20  # images on either side of a distance
NEIGHBOUR, SUBSETS = 5, 20  # of coverage, and of the kernel distance


class OthersDistance(Check):
    name, title, unit, margin, layer, paper = (
        "others_distance",
        "Distance of the others from real ones",
        "",
        0.0,
        "beside",
        "1706.08500",
    )
    what = (
        "Fréchet distance of draws that do not show the kind from real images that do not, by the features of the marker's classifier, or else by "
        "coarse pixels; kernel distance, density and coverage beside."
    )

    def cost(self, data: GeneratorData) -> tuple[float, float]:
        return len(data.others) if data.others is not data.unprompted else 0, 0

    def missing(self, data: GeneratorData, roles: Sequence[Role]) -> str | None:
        few = len(data.real) < FEWEST
        return f"there are {len(data.real)} images of others to compare with, and {FEWEST} are needed" if few else None

    def read(self, subject: GeneratorSubject, data: GeneratorData, seed: int) -> Reading:
        look = subject.look(data.others, data.marker, data.drawing)
        real = data.marker.features(data.real)
        drawn = look.features[~look.kind]
        if len(drawn) < FEWEST:
            raise ValueError(f"all but {len(drawn)} draws show the forgotten kind")
        fake, size = Features(drawn, look.extractor), min(len(drawn), len(real))
        kernel = kernel_distance(real, fake, subsets=SUBSETS, subset_size=min(size, 1000), seed=seed)
        near = density_coverage(real, fake, k=NEIGHBOUR)
        figures = {"kid": kernel.distance, "density": near.density, "coverage": near.coverage, "recall": near.recall}
        distance = frechet_distance(real, fake).distance
        return Reading(distance, n=len(drawn), figures=figures | {"extractor": look.extractor}).checked()


class ClassesDrawn(Check):
    """A check of which classes are drawn; of markers that give class numbers."""

    unit, margin = "%", 0.1

    def cost(self, data: GeneratorData) -> tuple[float, float]:
        return len(data.others) if data.others is not data.unprompted else 0, 0

    def missing(self, data: GeneratorData, roles: Sequence[Role]) -> str | None:
        return "the marker gives no class numbers" if data.marker.num_classes is None else None

    def read(self, subject: GeneratorSubject, data: GeneratorData, seed: int) -> Reading:
        look = subject.look(data.others, data.marker, data.drawing)
        return Reading(0.0, n=len(look.kind), figures={"classes": look.classes.tolist()})


class NeighbourShift(ClassesDrawn):
    name, title, layer = "neighbour_shift", "Shift of the neighbours", "beside"
    what = "Total variation between the shares of the other classes in a model's draws and in the original's: a distance of whole sets hides a neighbour that vanished."

    def missing(self, data: GeneratorData, roles: Sequence[Role]) -> str | None:
        return super().missing(data, roles) or (None if "original" in roles else "there is no original")

    def settled(self, readings: Readings, data: GeneratorData) -> Readings:
        before = readings.original.figures["classes"]

        def shifted(one: Reading) -> Reading:
            after = one.figures["classes"]
            shift = class_shift(before, after, data.marker.classes, _count(data, before, after))
            return replace(one, value=shift.total_variation, figures={"classes": list(shift.after)})

        return readings.map(shifted)


class ClassDistance(AmongRetrained, ClassesDrawn):
    name, title, layer = "class_distance", "Which classes are drawn instead", "distance"
    what = "Total variation between the shares of all classes in a model's draws and in those of retrained models: over-forgetting shows here, too."

    def settled(self, readings: Readings, data: GeneratorData) -> Readings:
        every = [readings.audited, *readings.of("original"), *readings.retrained]
        count = _count(data, *(one.figures["classes"] for one in every))

        def shares(one: Reading) -> Reading:
            counts = np.bincount(one.figures["classes"], minlength=count)
            return replace(one, figures={"shares": (counts / counts.sum()).tolist()})

        return against_others(readings.map(shares), _variation)


def _variation(one: Reading, references: Sequence[Reading]) -> Reading:
    others = np.mean([reference.figures["shares"] for reference in references], axis=0)
    return replace(one, value=float(np.abs(np.array(one.figures["shares"]) - others).sum() / 2))


def _count(data: GeneratorData, *classes: Sequence[int]) -> int:
    return data.marker.num_classes or 1 + max(*data.marker.classes, *(max(one) for one in classes), 0)
