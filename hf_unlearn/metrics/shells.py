"""The metrics of generators and of language models as `evaluate.Metric`s, for code that speaks this interface; the figures come from
[`hf_unlearn.metrics.generation`] and [`hf_unlearn.metrics.language`]. Apart from those, because `import evaluate` takes seconds."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict

import datasets
import evaluate
import numpy as np
import torch

from . import generation, language
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


# Language models. Figures are means over the rows.


NUMBER, WHOLE, TEXT = (datasets.Value(kind) for kind in ("float64", "int64", "string"))


class _LanguageMetric(evaluate.Metric):
    description: str
    inputs: str
    paper = "arXiv 2506.12618"
    columns: tuple = (NUMBER, NUMBER)  # of predictions and references

    def _info(self) -> evaluate.MetricInfo:
        return _info(self.description, self.inputs, self.paper, *self.columns)


class _OfTokens(_LanguageMetric):
    """Rows may differ in length. As a Trainer's evaluation has them, what stands at a place is of the next token."""

    inputs = "predictions: the likeliest token at each place, [n, length]. references: labels, −100 where a token is no part of the answer."
    columns = (datasets.List(WHOLE), datasets.List(WHOLE))

    def _tensors(self, predictions: list, references: list) -> list[torch.Tensor]:
        return [
            torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)
            for rows, fill in ((predictions, 0), (references, language.IGNORED))
        ]


class AnswerProbability(_OfTokens):
    """Mean of exp of the mean log-probability of each answer's tokens (TOFU): `compute()` returns `probability` and `loss`.

    `predictions` are the log-probabilities of the tokens that come, `[n, length]`.
    """

    description = "Probability of the answers, normalised for their length."
    inputs = "predictions: log-probability of the next token at each place, [n, length]. references: labels, −100 where a token is no part of the answer."
    paper = "arXiv 2401.06121"
    columns = (datasets.List(NUMBER), datasets.List(WHOLE))

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        log_p, labels = self._tensors(predictions, references)
        counts = labels[:, 1:] != language.IGNORED
        nll = -log_p[:, :-1].double().masked_fill(~counts, 0).sum(1) / counts.sum(1)
        return {"probability": float((-nll).exp().mean()), "loss": float(nll.mean())}


class ExactMemorization(_OfTokens):
    """[`~hf_unlearn.metrics.language.exact_memorization`]: `compute()` returns `exact_memorization`."""

    description = "Share of the answers' tokens, but the last, that are the model's first choice."

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        values = language.exact_memorization(*self._tensors(predictions, references))
        return {"exact_memorization": float(values.mean())}


class ExtractionStrength(_OfTokens):
    """[`~hf_unlearn.metrics.language.extraction_strength`]: `compute()` returns `extraction_strength`."""

    description = "Share of the answers that comes by itself once what is before it is given."

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        values = language.extraction_strength(*self._tensors(predictions, references))
        return {"extraction_strength": float(values.mean())}


class RougeL(_LanguageMetric):
    """[`~hf_unlearn.metrics.language.rouge_l_recall`] and [`~hf_unlearn.metrics.language.rouge_l_f1`] of texts: `compute()` returns
    `rouge_l_recall` and `rouge_l_f1`.
    """

    description = "Longest common subsequence of words."
    inputs = "predictions, references: texts, [n]."
    paper = "arXiv 2401.06121"
    columns = (TEXT, TEXT)

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        names = ("rouge_l_recall", "rouge_l_f1")
        return {name: float(getattr(language, name)(predictions, references).mean()) for name in names}


class TruthRatio(_LanguageMetric):
    """[`~hf_unlearn.metrics.language.truth_ratio`]: `compute(forgotten=True)` returns `truth_ratio`, TOFU's mean of it
    ([`~hf_unlearn.metrics.language.mean_truth_ratio`]).
    """

    description = "How likely false answers are beside the true one."
    inputs = "predictions: mean loss of the false answers, [n, answers]. references: of the true one, [n]. forgotten: whether the rows are."
    paper = "arXiv 2401.06121"
    columns = (datasets.List(NUMBER), NUMBER)

    def _compute(self, predictions: list, references: list, forgotten: bool = True) -> dict[str, float]:
        ratios = language.truth_ratio(references, predictions)
        return {"truth_ratio": language.mean_truth_ratio(ratios, forgotten=forgotten)}


class ForgetQuality(_LanguageMetric):
    """[`~hf_unlearn.metrics.language.forget_quality`]: `compute()` returns `forget_quality`."""

    description = "p of a Kolmogorov–Smirnov test between truth ratios of a model and of a retrained one."
    inputs = "predictions, references: truth ratios under the model and under the retrained one, [n]."
    paper = "arXiv 2401.06121"

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        return {"forget_quality": language.forget_quality(predictions, references)}


class MembershipAUC(_LanguageMetric):
    """[`~hf_unlearn.metrics.language.membership_auc`]: `compute()` returns `auc`, and with `retrained_auc=` also
    [`~hf_unlearn.metrics.language.privleak`].
    """

    description = "Success of an attacker who says that rows with a low score were trained on."
    inputs = "predictions: scores, [n]. references: 1 of a row that was trained on, else 0. retrained_auc: of a retrained model."
    paper = "arXiv 2407.06460"
    columns = (NUMBER, WHOLE)

    def _compute(self, predictions: list, references: list, retrained_auc: float | None = None) -> dict[str, float]:
        scores, member = np.array(predictions), np.array(references, dtype=bool)
        auc = language.membership_auc(scores[member], scores[~member])
        return {"auc": auc} | ({} if retrained_auc is None else {"privleak": language.privleak(auc, retrained_auc)})


class ChoiceAccuracy(_LanguageMetric):
    """[`~hf_unlearn.metrics.language.choice_accuracy`]: `compute()` returns `accuracy`."""

    description = "Share of multiple-choice questions whose right letter is the likeliest."
    inputs = "predictions: log-likelihoods of the choices, [n, choices]. references: number of the right one, [n]."
    paper = "arXiv 2403.03218"
    columns = (datasets.List(NUMBER), WHOLE)

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        return {"accuracy": language.choice_accuracy(predictions, references)}


def _info(description: str, inputs: str, paper: str, column, other=None) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation=paper,
        inputs_description=inputs,
        features=datasets.Features({"predictions": column, "references": column if other is None else other}),
    )
