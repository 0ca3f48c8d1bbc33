r"""Residual μ: how well an unlearned model is told from models that never saw the data, by the test that influence uses.

The statistic is the loss of the forget set. Retrained models give its law without the data, $N(m, \sigma^2)$, from which a model with loss
$\ell$ lies $\mu = (m - \ell)/\sigma$ standard deviations away: positive where it knows the data better than models that never saw them, negative
where it was driven further than that. With few references σ itself is uncertain: $\sqrt R\,\hat\mu$ has a noncentral t law with $R - 1$ degrees of
freedom and noncentrality $\sqrt R\,\mu$, whose quantiles give the interval. The best test between the two laws errs as `tradeoff/` says of μ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import ndtr

from ..tradeoff.curve import auc_of
from .equivalence import CONFIDENCE, Status, spreads_apart


STATED = 1.0  # μ that counts as none: the best test then has an AUC of 0.76
MIN_REFERENCES = 3
NODES = 4000  # of the quadrature over what σ may be


@dataclass(frozen=True)
class ResidualMu:
    """Residual μ of an audit. It depends on the data it was estimated from and is no privacy guarantee.

    Args:
        mu (`float`, *optional*): positive where the audited model knows the forget data better than retrained ones. None below 3 references.
        low, high (`float`, *optional*): its interval, each bound at 95 %.
        margin (`float`, *optional*): |μ| below which an interval may lie, so that one more retrained model is within it with all the checks.
        status (`str`): as of a check.
        references (`int`): retrained models.
        original (`float`, *optional*): μ of the original.
        loss (`float`, *optional*): of the audited model on the forget data, as its family has it. None where it has none for such data.
        retrained_loss (`tuple[float, ...]`): of each retrained one.
        chance (`float`, *optional*): loss of who says of the forget data what one says who knows nothing. None where that is not known.
    """

    mu: float | None
    low: float | None
    high: float | None
    margin: float | None
    status: Status
    references: int
    original: float | None
    loss: float | None
    retrained_loss: tuple[float, ...]
    chance: float | None = None

    @property
    def knows(self) -> bool:
        """Whether it proves memory: far better than models that never saw the data, and better than who knows nothing, who beats a model that is sure of
        something wrong.
        """
        beyond = self.status == "beyond" and self.mu is not None and self.mu > 0
        return beyond and (self.chance is None or self.loss < self.chance)

    def in_words(self) -> str:
        if self.loss is None:
            return "residual μ is not known: such a model gives no loss for such forget data"
        if self.mu is None:
            return f"residual μ is not known with {self.references} retrained models (needs {MIN_REFERENCES})"
        return (
            f"residual μ {self.mu:+.1f} [{self.low:+.1f}, {self.high:+.1f}], margin ±{self.margin:.1f} "
            f"(an original's is {'not known' if self.original is None else format(self.original, '+.1f')})"
        )

    @property
    def auc(self) -> float | None:
        """Of the best test between the two laws, ½ where they are one."""
        return None if self.mu is None else float(auc_of(self.mu))


def residual_mu(
    audited: float | None,
    references: Sequence[float | None],
    *,
    original: float | None,
    checks: int,
    chance: float | None = None,
) -> ResidualMu:
    """[`ResidualMu`] of losses of the forget set.

    Args:
        audited, original (`float`): the second one is optional. None where there is no loss, of the references too.
        references (`Sequence[float]`): of the retrained models.
        checks (`int`): K, of all that take part in the verdict.
        chance (`float`, *optional*): see [`ResidualMu`].
    """
    if audited is None:
        return ResidualMu(None, None, None, None, "unknown", len(references), None, None, ())
    losses, count = tuple(map(float, references)), len(references)
    if count < MIN_REFERENCES:
        return ResidualMu(None, None, None, None, "unknown", count, None, audited, losses, chance)
    mean, spread = float(np.mean(losses)), float(np.std(losses, ddof=1))
    mu, of_original = (None if loss is None else _ratio(mean - loss, spread) for loss in (audited, original))
    low, high = interval(mu, count)
    margin = max(STATED, largest_of_retrained(count, checks))
    far, near = max(abs(low), abs(high)), 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    if near > margin:
        status = "beyond"
    elif far > margin:
        status = "unclear"
    elif of_original is None or spreads_apart(2 * checks) < abs(of_original) <= margin:
        status = "blind"
    else:
        status = "within"
    return ResidualMu(mu, low, high, margin, status, count, of_original, audited, losses, chance)


def interval(mu: float, references: int) -> tuple[float, float]:
    """Interval of μ, each bound at [`CONFIDENCE`], from its estimate with so many references."""
    root, freedom = math.sqrt(references), references - 1
    t = mu * root
    if math.isinf(t):
        return t, t
    # P(T ≤ t) = E Φ(t χ/√ν − nc): scipy's own nct.cdf is NaN in its tails (1.16).
    chi = np.sqrt(stats.chi2.ppf((np.arange(NODES) + 0.5) / NODES, freedom) / freedom)

    def noncentrality(probability: float) -> float:
        reach = 4 * abs(t) + 10
        return brentq(lambda nc: ndtr(t * chi - nc).mean() - probability, -reach, reach) / root

    return noncentrality(CONFIDENCE), noncentrality(1 - CONFIDENCE)


def largest_of_retrained(references: int, checks: int) -> float:
    """Up to where the interval of one more retrained model reaches, at the corrected level."""
    mu = stats.t.ppf(1 - (1 - CONFIDENCE) / (2 * checks), references - 1) * math.sqrt(1 + 1 / references)
    return interval(float(mu), references)[1]


def _ratio(shift: float, spread: float) -> float:
    return 0.0 if shift == 0 else math.copysign(math.inf, shift) if spread == 0 else shift / spread
