"""Which of many examples stand out: an empirical null and the false discovery rate."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri
from scipy.stats import false_discovery_control

from .curve import (
    Array,
    _observations,
    _require_within,
)
from .estimate import (
    _ratio,
)


def empirical_null(values: ArrayLike) -> tuple[float, float]:
    """Centre and scale of the bulk of the values, that of the examples which do nothing: median and IQR / 1.349.

    The scale is the standard deviation if the bulk is Gaussian, whatever up to a quarter of the values does on either
    side. If half of the values are the same the IQR is 0 and the plain standard deviation is returned, which outliers
    widen, so that nothing stands out by accident; 0 only if all values are the same.

    Args:
        values (array of `float`): `[n]`, n at least 2.

    Raises:
        ValueError: fewer than two values, or NaN or infinite ones.
    """
    values = _observations("values", values, at_least=2)
    lower, centre, upper = np.quantile(values, [0.25, 0.5, 0.75])
    scale = (upper - lower) / (2 * ndtri(0.75)) or (values - values[0]).std(ddof=1)
    return float(centre), float(scale)


def z_scores(values: ArrayLike) -> Array:
    """`[n]` distances from the centre of `empirical_null(values)` in its scale; 0 if all values are the same.

    Raises:
        ValueError: fewer than two values, or NaN or infinite ones.
    """
    centre, scale = empirical_null(values)
    return _ratio(np.asarray(values, dtype=np.float64) - centre, np.asarray(scale))


def benjamini_hochberg(p_values: ArrayLike) -> Array:
    """The least false-discovery rate at which each hypothesis is rejected (Benjamini and Hochberg, 1995).

    Valid for independent or positively dependent tests.

    Args:
        p_values (array of `float`): `[n]`, in [0, 1].

    Returns:
        array: `[n]` q-values in [0, 1], in the order of `p_values`; `q <= 0.05` holds 5 % false ones on average.

    Raises:
        ValueError: p-values that are not one-dimensional or not in [0, 1].
    """
    p = _observations("p_values", p_values, at_least=0)
    _require_within("p_values", p, (p >= 0) & (p <= 1), "within [0, 1]")
    return false_discovery_control(p, method="bh") if len(p) else p
