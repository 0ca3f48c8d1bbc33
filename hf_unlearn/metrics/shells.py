"""The metrics of generators as `evaluate.Metric`s, for code that speaks this interface; the figures come from
[`hf_unlearn.metrics.generation`]. Here, not in the package, because `import evaluate` takes seconds."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict

import datasets
import evaluate

from . import generation
from .features import Features


class PercentageUnlearned(evaluate.Metric):
    """[`percentage_unlearned`]: `references` are predicted classes before, `predictions` after, latent by latent.

    `compute(forgotten=..., confidence=0.95)` returns the fields of [`UnlearnedResult`].
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Share of the images of a forgotten class that are gone, in percent.",
            "predictions, references: predicted class after and before, [n]. forgotten: class or classes.",
            "arXiv 2309.14054",
            datasets.Value("int64"),
        )

    def _compute(
        self, predictions: list, references: list, forgotten: int | Collection[int], confidence: float = 0.95
    ) -> dict:
        return asdict(
            generation.percentage_unlearned(references, predictions, forgotten=forgotten, confidence=confidence)
        )


class _FeatureMetric(evaluate.Metric):
    """`references` are features of real images, `predictions` of generated ones, as many: an `evaluate.Metric` holds
    pairs. The functions take sets of different sizes."""

    description: str
    paper: str
    function: staticmethod

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            self.description,
            "predictions, references: features of generated and of real images, [n, d]. extractor: its name.",
            self.paper,
            datasets.List(datasets.Value("float64")),
        )

    def _compute(self, predictions: list, references: list, extractor: str, **settings) -> dict:
        real, fake = Features(references, extractor), Features(predictions, extractor)
        return asdict(self.function(real, fake, **settings))


class FrechetDistance(_FeatureMetric):
    """[`frechet_distance`]: `compute(extractor=...)` returns the fields of [`FrechetResult`]."""

    description = "Fréchet distance between Gaussians fitted to features; FID where they are Inception's."
    paper = "arXiv 1706.08500"
    function = staticmethod(generation.frechet_distance)


class KernelDistance(_FeatureMetric):
    """[`kernel_distance`]: `compute(extractor=..., subsets=100, subset_size=1000, seed=0)` returns the fields of
    [`KernelResult`]."""

    description = "Squared maximum mean discrepancy of features; KID where they are Inception's."
    paper = "arXiv 1801.01401"
    function = staticmethod(generation.kernel_distance)


class DensityCoverage(_FeatureMetric):
    """[`density_coverage`]: `compute(extractor=..., k=5)` returns the fields of [`DensityCoverageResult`]."""

    description = "Fidelity and diversity of generated images by nearest neighbours of their features."
    paper = "arXiv 2002.09797"
    function = staticmethod(generation.density_coverage)


def _info(description: str, inputs: str, paper: str, column) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation=paper,
        inputs_description=inputs,
        features=datasets.Features({"predictions": column, "references": column}),
    )
