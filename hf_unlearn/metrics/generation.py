"""What a generator still draws: the forgotten class, the other classes, and how close all of it is to real images."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from .features import FeatureMoments, Features, check_comparable


CHUNK = 1024  # rows of a distance matrix at a time


@dataclass(frozen=True)
class UnlearnedResult:
    """What [`percentage_unlearned`] returns.

    Args:
        pul, low, high (`float`): percent; the figure and its interval.
        n_before, n_after (`int`): images in a forgotten class.
        n_samples (`int`): latents, the same before and after.
        confidence (`float`): of the interval.
    """

    pul: float
    low: float
    high: float
    n_before: int
    n_after: int
    n_samples: int
    confidence: float


def percentage_unlearned(
    before: ArrayLike, after: ArrayLike, forgotten: int | Collection[int], *, confidence: float = 0.95
) -> UnlearnedResult:
    r"""How many of the images that showed the forgotten class no longer do (Adapt-then-Unlearn, arXiv 2309.14054).

    `PUL = 100 (n_before − n_after) / n_before`: the same latents are decoded by the model before and after, and a
    classifier counts the forgotten class. 100 is none left, 0 is no change, and negative is more than before.

    The interval is Bonett & Price's (2006, hybrid Wilson score) for a ratio of paired proportions. It speaks of other
    latents, not of other trainings or other classifiers, and stays open where nothing is left of few images.

    Args:
        before, after (array of `int`): `[n]`, predicted class of latent i's image by either model.
        forgotten (`int` or collection of `int`): the class or classes.
        confidence (`float`, defaults to 0.95): of the interval.

    Raises:
        ValueError: different numbers of samples, or no image of the forgotten class before.
    """
    before, after, forgotten = _classes(before, "before"), _classes(after, "after"), _forgotten(forgotten)
    if len(before) != len(after):
        raise ValueError(f"after: must come from the same {len(before)} latents as `before`, got {len(after)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: must be in (0, 1), got {confidence}")
    was, still = np.isin(before, forgotten), np.isin(after, forgotten)
    n_before, n_after = int(was.sum()), int(still.sum())
    if not n_before:
        raise ValueError(f"before: nothing to unlearn, none of {len(before)} images is in a class of {forgotten}")

    either, changed = int((was | still).sum()), int((was != still).sum())
    # Two Wilson intervals, with z shrunk so that their ratio has the width of the log ratio of dependent proportions.
    widths = (np.sqrt((1 - (n + 1) / (either + 2)) / (n + 1)) for n in (n_before, n_after))
    shrink = np.sqrt((changed + 2) / ((n_before + 1) * (n_after + 1))) / sum(widths)
    z = shrink * NormalDist().inv_cdf((1 + confidence) / 2)
    (before_low, before_high), (after_low, after_high) = (_wilson(n, either, z) for n in (n_before, n_after))
    return UnlearnedResult(
        pul=100 * (n_before - n_after) / n_before,
        low=float(100 * (1 - after_high / before_low)),
        high=float(100 * (1 - after_low / before_high)),
        n_before=n_before,
        n_after=n_after,
        n_samples=len(before),
        confidence=confidence,
    )


def per_class_counts(predictions: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """How many images are predicted as each class.

    Args:
        predictions (array of `int`): `[n]`, in [0, `num_classes`).
        num_classes (`int`): length of the result.

    Returns:
        array: `[num_classes]`.
    """
    predictions = _classes(predictions, "predictions")
    if predictions.size and not 0 <= predictions.min() <= predictions.max() < num_classes:
        raise ValueError(f"predictions: must be in [0, {num_classes}), got {predictions.min()} to {predictions.max()}")
    return np.bincount(predictions, minlength=num_classes)


@dataclass(frozen=True)
class ClassShift:
    """What [`class_shift`] returns.

    Args:
        total_variation (`float`): in [0, 1], between the kept classes' shares before and after.
        before, after (`tuple[int, ...]`): images of each class, the forgotten ones included.
        forgotten (`tuple[int, ...]`): the classes that are left out of `total_variation`.
    """

    total_variation: float
    before: tuple[int, ...]
    after: tuple[int, ...]
    forgotten: tuple[int, ...]


def class_shift(before: ArrayLike, after: ArrayLike, forgotten: int | Collection[int], num_classes: int) -> ClassShift:
    """Which classes took the place of the forgotten ones, and which were lost with them: a distance of whole sets, such
    as FID, hides a neighbour that vanished.

    `TV = ½ Σ_c |p_c − q_c|` over the kept classes c, where p and q are their shares among kept images: 0 where the
    forgotten class's place is divided in proportion, 1 where no kept class of before is left.

    Args:
        before, after (array of `int`): `[n]`, `[m]`, predicted classes; the two may have different sizes.
        forgotten (`int` or collection of `int`): the class or classes.
        num_classes (`int`): of the classifier.

    Raises:
        ValueError: a class is out of range, or one side has no image of a kept class.
    """
    forgotten = _forgotten(forgotten)
    if not 0 <= forgotten[0] <= forgotten[-1] < num_classes:
        raise ValueError(f"forgotten: must be in [0, {num_classes}), got {forgotten}")
    counts = per_class_counts(before, num_classes), per_class_counts(after, num_classes)
    kept = [np.delete(count, forgotten) for count in counts]
    for name, count in zip(("before", "after"), kept, strict=True):
        if not count.sum():
            raise ValueError(f"{name}: has no image of a kept class, all are in {forgotten}")
    p, q = (count / count.sum() for count in kept)
    return ClassShift(float(abs(p - q).sum() / 2), *(tuple(count.tolist()) for count in counts), forgotten)


@dataclass(frozen=True)
class FrechetResult:
    """What [`frechet_distance`] returns: the distance, what it was measured on, and how many images were on each side."""

    distance: float
    extractor: str
    n_real: int
    n_fake: int
    n_features: int


def frechet_distance(real: Features | FeatureMoments, fake: Features | FeatureMoments) -> FrechetResult:
    """Fréchet distance between Gaussians fitted to two sets of features (Heusel et al. 2017, arXiv 1706.08500): FID
    where the features are Inception's.

    `‖μ_r − μ_f‖² + tr(Σ_r + Σ_f − 2 (Σ_r Σ_f)^½)`. It is biased upwards, the more so the fewer images there are for
    each feature: only compare figures with the same extractor and the same `n_real` and `n_fake`.

    Args:
        real, fake ([`Features`] or [`~hf_unlearn.metrics.features.FeatureMoments`]): `[n, d]`, `[m, d]`; at least two images each. Either may
            be held as its moments, which take the same memory however many images there are.

    Raises:
        ValueError: too few images, or features of different extractors.
    """
    check_comparable(real, fake, at_least=2)
    one, other = (FeatureMoments().update(side) if isinstance(side, Features) else side for side in (real, fake))
    # The eigenvalues of Σ_r Σ_f are those of Σ_r^½ Σ_f Σ_r^½; rounding gives some a small imaginary part, or takes them below 0.
    roots = torch.linalg.eigvals(one.covariance @ other.covariance).sqrt().real.sum()
    traces = one.covariance.trace() + other.covariance.trace()
    distance = max(0.0, float((one.mean - other.mean).square().sum() + traces - 2 * roots))
    return FrechetResult(distance, real.extractor, len(real), len(fake), real.size)


@dataclass(frozen=True)
class KernelResult:
    """What [`kernel_distance`] returns: the mean and the standard deviation over subsets, and how they came about.

    The mean estimates a squared distance without bias, so it may be negative. `std` says how much a subset's figure
    varies, not how far the mean is off; it is 0 where a subset holds all images.
    """

    distance: float
    std: float
    subsets: int
    subset_size: int
    seed: int
    extractor: str
    n_real: int
    n_fake: int


def kernel_distance(
    real: Features, fake: Features, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelResult:
    """Squared maximum mean discrepancy with the kernel `(xᵀy / d + 1)³` (Bińkowski et al. 2018, arXiv 1801.01401),
    computed by torchmetrics: KID where the features are Inception's. The figure to use when images are few.

    Args:
        real, fake ([`Features`]): `[n, d]`, `[m, d]`.
        subsets (`int`, defaults to 100): random subsets of either side that are compared.
        subset_size (`int`, defaults to 1000): images in each, without replacement; at most `n` and `m`, at least 2.
        seed (`int`, defaults to 0): of the subsets; PyTorch's own random state is left alone.

    Raises:
        ValueError: fewer images than `subset_size`, or features of different extractors.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    if subsets < 1 or subset_size < 2:
        raise ValueError(f"subsets, subset_size: must be at least 1 and 2, got {subsets} and {subset_size}")
    check_comparable(real, fake, at_least=subset_size, hint=", or pass a smaller `subset_size`")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
        metric = KernelInceptionDistance(
            feature=nn.Identity(), subsets=subsets, subset_size=subset_size, sync_on_compute=False
        )
    metric.update(real.values, real=True)
    metric.update(fake.values, real=False)
    with torch.random.fork_rng(devices=[]):  # torchmetrics 1.9 draws the subsets with the CPU's global generator
        torch.default_generator.manual_seed(seed)
        mean, std = metric.compute()
    return KernelResult(mean.item(), std.item(), subsets, subset_size, seed, real.extractor, len(real), len(fake))


@dataclass(frozen=True)
class DensityCoverageResult:
    """What [`density_coverage`] returns: four figures, the neighbour that set the radii, and the sample sizes."""

    density: float
    coverage: float
    precision: float
    recall: float
    k: int
    extractor: str
    n_real: int
    n_fake: int


def density_coverage(real: Features, fake: Features, *, k: int = 5) -> DensityCoverageResult:
    """Fidelity and diversity as two figures (Naeem et al. 2020, arXiv 2002.09797), with the precision and recall that
    they improve on (Kynkäänniemi et al. 2019, arXiv 1904.06991).

    With B(x) the open ball around x that ends at the k-th nearest neighbour of x in its own set, as in the authors' code:
    `density = 1/(kM) Σ_j Σ_i 1[fake_j ∈ B(real_i)]`, which is about 1 for equal laws and may be above;
    `coverage = 1/N Σ_i 1[∃ j: fake_j ∈ B(real_i)]`, which is about 1 − 2^−k for equal laws and N = M;
    `precision` is the share of fakes inside some B(real_i), `recall` that of reals inside some B(fake_j).

    Args:
        real, fake ([`Features`]): `[N, d]`, `[M, d]`; more than `k` images each. Time grows with N·M·d.
        k (`int`, defaults to 5): neighbour that sets the radius.

    Raises:
        ValueError: too few images, or features of different extractors.
    """
    if k < 1:
        raise ValueError(f"k: must be at least 1, got {k}")
    check_comparable(real, fake, at_least=k + 1, hint=", or pass a smaller `k`")
    radius_real, radius_fake = _radii(real.values, k), _radii(fake.values, k)
    holders = torch.zeros(len(fake), dtype=torch.int64, device=real.values.device)  # real balls that hold this fake
    covered, recalled = [], []
    for rows, radius in zip(real.values.split(CHUNK), radius_real.split(CHUNK), strict=True):
        distances = _distances(rows, fake.values)
        inside = distances < radius[:, None]
        holders += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((distances < radius_fake).any(1))
    return DensityCoverageResult(
        density=holders.double().mean().item() / k,
        coverage=torch.cat(covered).double().mean().item(),
        precision=(holders > 0).double().mean().item(),
        recall=torch.cat(recalled).double().mean().item(),
        k=k,
        extractor=real.extractor,
        n_real=len(real),
        n_fake=len(fake),
    )


def _radii(points: Tensor, k: int) -> Tensor:
    # The k + 1 smallest distances begin with the point's own.
    return torch.cat([_distances(rows, points).kthvalue(k + 1).values for rows in points.split(CHUNK)])


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # The faster way over a matrix product gives equal points a distance above 0, and ties an order by chance.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _wilson(count: int, total: int, z: float) -> tuple[float, float]:
    centre, half = 2 * count + z**2, z * np.sqrt(z**2 + 4 * count * (1 - count / total))
    return (centre - half) / (2 * (total + z**2)), (centre + half) / (2 * (total + z**2))


def _classes(values: ArrayLike, name: str) -> NDArray[np.int64]:
    values = np.asarray(values)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name}: must be [n] class indices, got {values.dtype} {list(values.shape)}")
    return values


def _forgotten(classes: int | Collection[int]) -> tuple[int, ...]:
    classes = tuple(sorted({int(c) for c in ([classes] if np.isscalar(classes) else classes)}))
    if not classes:
        raise ValueError("forgotten: must name at least one class")
    return classes
