"""FAST: a filter learned from a few marked samples of a generator (arXiv 2312.14895)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...images import IMAGE_COLUMNS, check_signed
from ..checker import FASTSafetyChecker
from ..config import SCHEMA_VERSION, FASTConfig
from ..encoding.encoders import FilterEncoder
from ..encoding.latents import as_rows
from ..scores import Basis, ScoreBank
from .background import Background
from .concept import FEWEST_UNMARKED, LARGEST, ConceptFit, FilteredConcept, Samples, Settings
from .forms import SCORES, basis_of
from .thresholds import RULES


Array = NDArray[np.float64]

CHUNK = 256  # rows of a dataset read at once
RATES = {"max_false_alarm": 0.05, "min_recall": 0.9}


@dataclass(frozen=True, eq=False)
class FASTResult:
    """A fitted filter.

    Args:
        concepts (tuple of [`FilteredConcept`]): one or more.
        encoder ([`FilterEncoder`], *optional*): None for a generator's own latents.
    """

    concepts: tuple[FilteredConcept, ...]
    encoder: FilterEncoder | None = None

    def checker(self) -> FASTSafetyChecker:
        """The filter as a model: saves, loads, judges."""
        bank = ScoreBank.of([c.score for c in self.concepts], [c.threshold.value for c in self.concepts])
        concepts = [
            {
                "name": concept.name,
                "description": concept.description,
                "score": concept.score.name,
                "shrinkage": concept.score.shrinkage,
                "threshold": asdict(concept.threshold) | {"promise": concept.threshold.promise},
                "figures": asdict(concept.figures),
            }
            for concept in self.concepts
        ]
        config = FASTConfig(
            schema_version=SCHEMA_VERSION,
            concepts=concepts,
            embedding_size=bank.dimension,
            components=bank.components,
            directions=len(bank.gains) if bank.components else 0,
            encoder_spec=None if self.encoder is None else self.encoder.spec,
        )
        return FASTSafetyChecker.around(config, bank, self.encoder)

    def __getitem__(self, name: str) -> FilteredConcept:
        found = {concept.name: concept for concept in self.concepts}
        if name not in found:
            raise ValueError(f"concept={name!r}: is not one of {', '.join(map(repr, found))}")
        return found[name]


class FASTFitter:
    """Learns a filter from marks on a generator's samples.

    ```python
    fitter = FASTFitter("openai/clip-vit-base-patch32")
    fitter.update(undesired=marked, clean=others)
    for images in batches:  # as many as you like: the generator makes them
        fitter.update(unmarked=images)
    result = fitter.fit()  # blocks at most 5 % of clean images, with confidence 95 %
    result.checker().save_pretrained("no-weapons")
    ```

    What is given may be images (PIL, or tensors `[n, channels, height, width]` in [−1, 1]), texts, or a `datasets.Dataset` with a
    column of them. Without an encoder it is the generator's latents, `[n, …]`.

    Args:
        encoder ([`FilterEncoder`] or `str`, *optional*): or its id or folder. `None`: latents.
        score (`str`, defaults to `"quadratic"`): `"quadratic"`, the marks against the unmarked pool ([`scores.quadratic`]);
            `"lda"`, `"linear_svc"` or `"mean_difference"` (both of the paper), undesired marks against clean ones. Without clean
            marks these draw stand-ins from unmarked samples, as the paper does.
        concepts (sequence or mapping of `str`, defaults to `("undesired",)`): names, or names and descriptions.
        components (`int`, defaults to 64): directions of the pool that the quadratic score sees.
        keep (`int`, defaults to 10,000): unmarked embeddings kept at most, for fitting and for calibration each.
        calibration_share (`float`, defaults to 0.5): of samples that are needed for both, how many are held out of fitting.
        seed (`int`, defaults to 0): of what is held out.
        batch_size (`int`, defaults to 32): inputs the encoder takes at a time.

    Raises:
        ValueError: an argument is not as above.
    """

    def __init__(
        self,
        encoder: FilterEncoder | str | os.PathLike | None = None,
        *,
        score: Literal["quadratic", "lda", "linear_svc", "mean_difference"] = "quadratic",
        concepts: Sequence[str] | Mapping[str, str] = ("undesired",),
        components: int = 64,
        keep: int = 10_000,
        calibration_share: float = 0.5,
        seed: int = 0,
        batch_size: int = 32,
    ):
        if score not in SCORES:
            raise ValueError(f"score={score!r}: must be one of {', '.join(SCORES)}")
        if not 0 < calibration_share < 1:
            raise ValueError(f"calibration_share={calibration_share}: must be in (0, 1)")
        least = {"components": (components, 1), "keep": (keep, 1), "batch_size": (batch_size, 1), "seed": (seed, 0)}
        for name, (value, bound) in least.items():
            if not isinstance(value, int) or value < bound:
                raise ValueError(f"{name}={value!r}: must be a whole number ≥ {bound}")
        names = [concepts] if isinstance(concepts, str) else list(concepts)
        if not names or len(set(names)) < len(names) or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"concepts={names!r}: must be different names, at least one")
        if isinstance(concepts, Mapping) and not all(isinstance(text, str) for text in concepts.values()):
            raise ValueError(f"concepts={dict(concepts)!r}: descriptions must be texts")
        self.encoder = FilterEncoder.from_pretrained(encoder) if isinstance(encoder, str | os.PathLike) else encoder
        self.score, self.components, self.keep, self.seed = score, components, keep, seed
        self.calibration_share, self.batch_size = calibration_share, batch_size
        self.concepts = {name: concepts[name] if isinstance(concepts, Mapping) else "" for name in names}
        self._undesired: dict[str, list[Array]] = {name: [] for name in names}
        self._clean: dict[str | None, list[Array]] = {name: [] for name in (None, *names)}  # None: of all concepts
        self._background: Background | None = None
        self._dimension: int | None = None

    def update(
        self,
        *,
        undesired: Any = None,
        clean: Any = None,
        unmarked: Any = None,
        concept: str | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> FASTFitter:
        """Take in samples; call it as often as you like. Nothing is taken where something is wrong: all samples of a call are
        embedded before.

        Args:
            undesired: samples that show the concept.
            clean: samples that somebody looked at and that do not show it; without `concept`, none of the concepts.
            unmarked: samples that nobody looked at, other ones than the clean ones, which are held out; they serve all concepts.
            concept (`str`, *optional*): whose marks they are; needed for `undesired` where there are several.
            value_range (`(-1, 1)` or `(0, 1)`, *optional*): of images that are tensors. By default (−1, 1), and one of these three
                without a value below 0 is refused, since nearly always it is in [0, 1], as `output_type="pt"` gives it.

        Raises:
            ValueError: an unknown concept, or samples that cannot be embedded or whose embeddings are not finite.
        """
        if concept is not None and concept not in self.concepts:
            raise ValueError(f"concept={concept!r}: is not one of {', '.join(map(repr, self.concepts))}")
        if undesired is not None and concept is None:
            if len(self.concepts) > 1:
                raise ValueError(f"concept: missing; say which of {', '.join(map(repr, self.concepts))} is undesired")
            concept = next(iter(self.concepts))
        given = {"undesired": undesired, "clean": clean, "unmarked": unmarked}
        embedded = {
            name: list(self._embedded(value, name, value_range)) for name, value in given.items() if value is not None
        }
        dimension = self._dimension
        for name, parts in embedded.items():
            for rows in parts:
                dimension = dimension or rows.shape[1]
                if rows.shape[1] != dimension:
                    raise ValueError(f"{name}: has {rows.shape[1]} numbers a sample, others had {dimension}")
        self._dimension = dimension
        self._undesired.get(concept, []).extend(embedded.get("undesired", []))
        self._clean[concept].extend(embedded.get("clean", []))
        for rows in embedded.get("unmarked", []):
            self._pool().update(rows)
        return self

    def _pool(self) -> Background:
        if self._background is None:
            wanted = self.score == "quadratic" and self._dimension <= LARGEST
            self._background = Background(
                self._dimension,
                keep=self.keep,
                calibration_share=self.calibration_share,
                seed=self.seed,
                covariance=wanted,
            )
        return self._background

    def _embedded(
        self, samples: Any, argument: str, value_range: tuple[float, float] | None = None
    ) -> Iterator[Array]:
        """Embeddings `[n, d]`, fp64, in parts; each checked."""
        found, seen = 0, []
        for part in _parts(samples, self.encoder, argument):
            if self.encoder is None:
                rows = as_rows(part, argument)
            else:
                rows = self.encoder(part, batch_size=self.batch_size, value_range=value_range or (-1, 1))
                if isinstance(part, Tensor) and part.is_floating_point():
                    seen.append(torch.stack(part.aminmax()))
            rows = rows.to("cpu", torch.float64).numpy()
            if not np.isfinite(rows).all():
                bad = int(np.argmin(np.isfinite(rows).all(1)))
                what = "latents" if self.encoder is None else "embedding"
                raise ValueError(f"{argument}: sample {found + bad} has NaN or infinite {what}; remove it")
            found += len(rows)
            yield rows
        if seen and value_range is None:  # of all parts together: some may well be bright
            check_signed(torch.stack(seen)[:, 0].min(), torch.stack(seen)[:, 1].max(), argument)
        if not found:
            raise ValueError(f"{argument}: is empty; pass samples, or leave it out")

    def fit(
        self,
        *,
        threshold: Literal["max_false_alarm", "min_recall", "pooled_mean"] = "max_false_alarm",
        rate: float | None = None,
        confidence: float = 0.95,
        max_prevalence: float | None = None,
        prevalence: float | None = None,
        augment: int = 0,
    ) -> FASTResult:
        """Fit all concepts; the fitter stays as it is and may take in more.

        Args:
            threshold (`str`, defaults to `"max_false_alarm"`): `"max_false_alarm"` blocks at most a share `rate` of clean
                samples and `"min_recall"` at least a share `rate` of undesired ones, both with a confidence and on samples held
                out of fitting ([`thresholds`]). `"pooled_mean"` is the paper's, and promises nothing.
            rate (`float`, *optional*): in (0, 1). Default: 0.05 false alarms, 0.9 recall.
            confidence (`float`, defaults to 0.95): over the draw of the calibration samples.
            max_prevalence (`float`, *optional*): calibrate `max_false_alarm` on unmarked samples, of which at most this share
                is undesired. By default clean marks are used.
            prevalence (`float`, *optional*): share of undesired samples among the generator's, if known: for the figures.
            augment (`int`, defaults to 0): draws of a Gaussian with each kind's mean and variances that take the place of its
                marks in fitting a linear score (the paper: 5,000).

        Raises:
            ValueError: too few marks, too few calibration samples for what is asked, both kinds the same, or an argument that
                is not as above.
        """
        if threshold not in RULES or threshold == "fixed":
            raise ValueError(f"threshold={threshold!r}: must be one of max_false_alarm, min_recall, pooled_mean")
        for name, value in (
            ("rate", rate),
            ("confidence", confidence),
            ("max_prevalence", max_prevalence),
            ("prevalence", prevalence),
        ):
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name}={value}: must be in (0, 1)")
        if threshold == "pooled_mean" and rate is not None:
            raise ValueError(f"rate={rate:g}: threshold='pooled_mean' takes none")
        if max_prevalence is not None and threshold != "max_false_alarm":
            raise ValueError(f"max_prevalence={max_prevalence:g}: only for threshold='max_false_alarm'")
        if augment < 0 or (augment and self.score == "quadratic"):
            raise ValueError(f"augment={augment}: must be ≥ 0, and 0 for score='quadratic'")
        pooled = self._background is not None and len(self._background.fitting) >= FEWEST_UNMARKED
        if self.score == "quadratic" and len(self.concepts) > 1 and not pooled:
            raise ValueError(
                f"unmarked: score='quadratic' for several concepts needs {FEWEST_UNMARKED} samples that serve all of them; let "
                "the generator draw more"
            )
        settings = Settings(
            self.score,
            self.components,
            self.calibration_share,
            self.seed,
            threshold,
            RATES.get(threshold) if rate is None else rate,
            confidence,
            max_prevalence,
            prevalence,
            augment,
        )
        basis = basis_of(self._background.moments, self.components) if pooled and self._background.moments else None
        fits = [ConceptFit(name, text, self._samples(name, basis), settings) for name, text in self.concepts.items()]
        return FASTResult(tuple(fit.result() for fit in fits), self.encoder)

    def _samples(self, name: str, basis: Basis | None) -> Samples:
        none = np.zeros((0, self._dimension or 0))
        return Samples(
            undesired=np.concatenate([none, *self._undesired[name]]),
            clean=np.concatenate([none, *self._clean[name], *self._clean[None]]),
            pool=self._background,
            basis=basis,
            latents=self.encoder is None,
        )


def _parts(samples: Any, encoder: FilterEncoder | None, argument: str) -> Iterator[Any]:
    """What the encoder takes, of a tensor, an array, a list, or the rows of a dataset."""
    columns = getattr(samples, "column_names", None)
    if columns is None:
        if isinstance(samples, str | bytes) or not hasattr(samples, "__len__"):
            raise ValueError(f"{argument}: must be a list, a tensor or a dataset, got {type(samples).__name__}")
        if len(samples):
            yield samples
        return
    wanted = ("latents",) if encoder is None else ("text",) if encoder.kind == "text" else IMAGE_COLUMNS
    column = next((name for name in wanted if name in columns), None)
    if column is None:
        raise ValueError(f"{argument}: has no column named one of {', '.join(wanted)}; rename one")
    for batch in samples.select_columns([column]).iter(CHUNK):
        values = batch[column]
        if encoder is None or (len(values) and not hasattr(values[0], "getbands") and not isinstance(values[0], str)):
            values = torch.stack([torch.as_tensor(np.asarray(value)) for value in values])
        yield values
