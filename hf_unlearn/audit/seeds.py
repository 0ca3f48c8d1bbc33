r"""An audit over training seeds: how much of what a check finds depends on the training, on the unlearning, and on how it was asked.

Value $y_{ijk}$ of evaluation k of unlearning j of training i is $m + a_i + b_{ij} + e_{ijk}$, random effects of variances $\sigma_T^2$, $\sigma_U^2$
and $\sigma_E^2$, which sum to the variance of one audit. Mean squares of the nested analysis of variance have the expectations

$$ E\,MS_E = \sigma_E^2, \quad E\,MS_U = \sigma_E^2 + K \sigma_U^2, \quad E\,MS_T = \sigma_E^2 + K \sigma_U^2 + J K \sigma_T^2. $$

An evaluation asks a random half of the forget rows (and of the others) by a seed of its own: of all halves the mean has the variance that all rows have as
a sample of more of their kind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tqdm.auto import tqdm

from ..files import first_line
from .check import Check, Subject
from .functions import UNLEARNINGS, Functions
from .store import Store, read_by


logger = logging.getLogger(__name__)
EVALUATIONS = 2  # of each unlearned model


def nested_components(values: ArrayLike) -> dict[str, float]:
    """Variances of three nested random effects, by the analysis of variance.

    Args:
        values (`array`): `[trainings, unlearnings, evaluations]`, at least 2 of each.

    Returns:
        `dict[str, float]`: `training`, `unlearning`, `evaluation`, none below 0.

    Raises:
        ValueError: fewer than 2 of one of them, or other axes.
    """
    y = np.asarray(values, dtype=np.float64)
    if y.ndim != 3 or min(y.shape) < 2:
        raise ValueError(
            f"values: shape {list(y.shape)}, must be [trainings, unlearnings, evaluations], 2 of each or more"
        )
    trainings, unlearnings, evaluations = y.shape
    of_unlearning, of_training = y.mean(2), y.mean((1, 2))
    squares = {
        "evaluation": ((y - of_unlearning[..., None]) ** 2).sum() / (trainings * unlearnings * (evaluations - 1)),
        "unlearning": evaluations
        * ((of_unlearning - of_training[:, None]) ** 2).sum()
        / (trainings * (unlearnings - 1)),
        "training": unlearnings * evaluations * of_training.var(ddof=1),
    }
    found = {
        "training": (squares["training"] - squares["unlearning"]) / (unlearnings * evaluations),
        "unlearning": (squares["unlearning"] - squares["evaluation"]) / evaluations,
        "evaluation": squares["evaluation"],
    }
    return {name: max(0.0, float(value)) for name, value in found.items()}


def over_seeds(
    functions: Functions,
    checks: Sequence[Check],
    rows: Any,
    subject: Callable[[Any], Subject],
    store: Callable[[str], Store],
    *,
    seed: int,
    trainings: int,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Train, unlearn and read again and again.

    Args:
        functions ([`Functions`]): both of them.
        checks (`Sequence[Check]`): those whose value is that of one model alone, see [`is_of_one_model`].
        rows ([`AuditData`]): with a method `half(seed, *key)`.
        subject (callable): of a model, what checks read.
        store (callable): of a digest of rows, where readings are kept.
        trainings (`int`): at least 2. Of each there are [`UNLEARNINGS`] and of each of these [`EVALUATIONS`].

    Returns:
        `dict`: by name of the check, `mean` and `sd` of one audit, the variances `training`, `unlearning` and `evaluation`, of which its square is the sum, and
        `values` `[trainings, unlearnings, evaluations]`. What raised is left out.
    """
    values: dict[str, np.ndarray] = {one.name: np.empty((trainings, UNLEARNINGS, EVALUATIONS)) for one in checks}
    every = range(len(functions.forget))
    for i in tqdm(range(trainings), desc="Trainings", disable=not progress):
        original = functions.trained(every, 2, i)
        for j in range(UNLEARNINGS):
            model = functions.unlearned(original, every, 2, i, j)
            for k in range(EVALUATIONS):
                half, one = rows.half(seed, 71, i, j, k), subject(model)
                draws = int(np.random.SeedSequence([seed, 72, i, j, k]).generate_state(1)[0] % 2**31)
                for check in checks:
                    if check.name not in values:
                        continue
                    try:
                        values[check.name][i, j, k] = read_by(check, one, half, draws, store(half.digest)).value
                    except Exception as error:  # whatever an attack raises, the others go on
                        del values[check.name]
                        logger.warning("%s over training seeds did not run: %s", check.name, first_line(error))
    return {name: _summary(found) for name, found in values.items()}


def is_of_one_model(check: Check) -> bool:
    """Whether its value depends on no other model."""
    return check.is_kept and type(check).settled is Check.settled


def _summary(values: np.ndarray) -> dict[str, Any]:
    parts = nested_components(values)
    return {
        "mean": float(values.mean()),
        "sd": float(np.sqrt(sum(parts.values()))),
        **parts,
        "values": values.tolist(),
    }
