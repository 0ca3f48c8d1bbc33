"""Moving blocks: resampling of series whose neighbours depend on each other."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .curve import (
    Array,
)


CHUNK_ELEMENTS = 2**22  # resampled values held at once, 32 MiB each


def detrended_std(series: ArrayLike, window: int | None = None) -> Array:
    """Standard deviation of the noise around a slow trend, along the last axis.

    The trend is a centred running mean; towards the ends its window shrinks and stays centred, so that a straight line
    leaves no residual. A running mean over w steps takes 1/w of the residual's variance with it, which is corrected
    for: σ² = Σ_t r_t² / Σ_t (1 − 1/w_t) is unbiased for independent noise.

    Args:
        series (array of `float`): `[..., steps]` with at least 3 steps.
        window (`int`, *optional*): of the running mean, in steps, odd and at least 3. Defaults to 2⌊√steps / 2⌋ + 1,
            but at least 3.

    Returns:
        array: `[...]`, in the unit of `series`.

    Raises:
        ValueError: fewer than 3 steps, or a `window` that is even or below 3.
    """
    series = np.asarray(series, dtype=np.float64)
    n = series.shape[-1] if series.ndim else 0
    if n < 3:
        raise ValueError(f"series: {n} steps; needs at least 3 to tell noise from trend")
    window = max(3, 2 * (math.isqrt(n) // 2) + 1) if window is None else window
    if window < 3 or window % 2 == 0:
        raise ValueError(f"window={window!r}: must be odd and at least 3")
    series = series - series[..., :1]  # a constant series has no noise at all, not one of rounding errors
    step = np.arange(n)
    half = np.minimum(window // 2, np.minimum(step, n - 1 - step))
    sums = np.concatenate([np.zeros_like(series[..., :1]), series.cumsum(-1)], axis=-1)
    width = 2 * half + 1
    residual = series - (sums[..., step + half + 1] - sums[..., step - half]) / width
    return np.sqrt(np.square(residual).sum(-1) / (1 - 1 / width).sum())


def moving_block_indices(
    length: int, block_length: int | None, n_resamples: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Resamples of a series that keep neighbours together: blocks of consecutive steps, drawn with replacement.

    Args:
        length (`int`): steps in the series.
        block_length (`int` or `None`): steps in a block; `None` for the cube root of `length`, rounded up. The last
            block of a resample is cut to fit.
        n_resamples (`int`): rows of the result.
        generator (`numpy.random.Generator`): source of the blocks' first steps.

    Returns:
        array of `int`: `[n_resamples, length]`, each in [0, length).

    Raises:
        ValueError: `n_resamples` below 1, or `block_length` outside 1 … `length`.
    """
    if block_length is None:
        block_length = math.ceil(round(length ** (1 / 3), 9))  # rounded: ∛64 is 3.9999999999999996 in floats
    if not 1 <= block_length <= length:
        raise ValueError(f"block_length={block_length!r}: must be between 1 and the {length} observations")
    _require_resamples(n_resamples)
    shape = n_resamples, math.ceil(length / block_length), 1
    starts = generator.integers(length - block_length + 1, size=shape)
    return (starts + np.arange(block_length)).reshape(n_resamples, -1)[:, :length]


def moving_block_bootstrap(
    estimator: Callable[..., Array],
    *samples: NDArray,
    n_resamples: int,
    block_length: int | None = None,
    generator: np.random.Generator,
) -> Array:
    """`estimator` on resamples of the series: with the same blocks if they are of one length, else each on its own.

    Args:
        estimator (callable): `estimator(*resamples) -> [r]` with one `[r, n]` array per sample.
        samples (arrays): `[n]` each.
        n_resamples, block_length, generator: see `moving_block_indices`.

    Returns:
        array: `[n_resamples]`.

    Raises:
        ValueError: see `moving_block_indices`.
    """
    lengths = [len(sample) for sample in samples]
    _require_resamples(n_resamples)
    chunk = max(1, CHUNK_ELEMENTS // sum(lengths))
    results = []
    for done in range(0, n_resamples, chunk):
        rows = min(chunk, n_resamples - done)
        if len(set(lengths)) == 1:
            indices = [moving_block_indices(lengths[0], block_length, rows, generator)] * len(samples)
        else:
            indices = [moving_block_indices(length, block_length, rows, generator) for length in lengths]
        results.append(estimator(*(sample[index] for sample, index in zip(samples, indices, strict=True))))
    return np.concatenate(results)


def _require_resamples(n_resamples: int) -> None:
    if n_resamples < 1:
        raise ValueError(f"n_resamples={n_resamples!r}: must be at least 1")
