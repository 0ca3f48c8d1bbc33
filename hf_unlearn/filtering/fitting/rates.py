"""What a filter does to a generator's output, in numbers: exact intervals of what is counted, wider ones of what follows from it.

π is the prevalence of what is undesired among the generator's samples, r the recall (share of it that is blocked), a the false
alarms (share of the rest that is blocked), q the share of all samples that is blocked:

    q = π r + (1 − π) a,    release A = 1 − q,    residual = π (1 − r) / A,

the residual being the share of what is undesired among what is released: 0 where nothing is left, π where the filter does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True)
class Rate:
    """A share and what bounds it.

    Args:
        value, low, high (`float`): in [0, 1].
        count, total (`int`, *optional*): what it was counted from.
        confidence (`float`): of the interval; of a rate that follows from others, of the intervals that it is the hull of.
    """

    value: float
    low: float
    high: float
    count: int | None = None
    total: int | None = None
    confidence: float = 0.95

    @classmethod
    def counted(cls, count: int, total: int, confidence: float = 0.95) -> Rate | None:
        """Of `count` in `total`, with the exact (Clopper–Pearson) interval; None of none."""
        if not total:
            return None
        interval = binomtest(int(count), int(total)).proportion_ci(confidence, method="exact")
        return cls(float(count / total), float(interval.low), float(interval.high), int(count), int(total), confidence)

    @property
    def complement(self) -> Rate:
        """Of the others."""
        count = None if self.count is None else self.total - self.count
        return Rate(1 - self.value, 1 - self.high, 1 - self.low, count, self.total, self.confidence)

    def __str__(self) -> str:
        counted = f", {self.count} of {self.total}" if self.count is not None else ""
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f}{counted})"


def blocked_rate(prevalence: float, recall: float, false_alarm: float) -> float:
    """q = π r + (1 − π) a."""
    return prevalence * recall + (1 - prevalence) * false_alarm


def release_rate(prevalence: float, recall: float, false_alarm: float) -> float:
    """A = π (1 − r) + (1 − π) (1 − a)."""
    return 1 - blocked_rate(prevalence, recall, false_alarm)


def residual_rate(prevalence: float, recall: float, false_alarm: float) -> float:
    """π (1 − r) / A; 0 where nothing is released."""
    released = release_rate(prevalence, recall, false_alarm)
    return prevalence * (1 - recall) / released if released > 0 else 0.0


def prevalence_of(blocked: float, recall: float, false_alarm: float) -> float:
    """π for which q = `blocked`, in [0, 1] (Rogan and Gladen, 1978).

    Raises:
        ValueError: recall is not above the false alarms, so that q says nothing about π.
    """
    if recall <= false_alarm:
        raise ValueError(
            f"recall={recall:.3g}: not above false_alarm={false_alarm:.3g}; the filter tells nothing apart"
        )
    return min(1.0, max(0.0, (blocked - false_alarm) / (recall - false_alarm)))


def release_of(prevalence: Rate, recall: Rate, false_alarm: Rate) -> Rate:
    """A with the widest interval that the three allow: it falls with r and a, and is linear in π."""
    value = release_rate(prevalence.value, recall.value, false_alarm.value)
    ends = [prevalence.low, prevalence.high]
    low = min(release_rate(end, recall.high, false_alarm.high) for end in ends)
    return Rate(value, low, max(release_rate(end, recall.low, false_alarm.low) for end in ends))


def residual_of(prevalence: Rate, recall: Rate, false_alarm: Rate) -> Rate:
    """The residual with the widest interval that the three allow: it rises with π, and with a, and falls with r."""
    value, low, high = (
        residual_rate(*ends)
        for ends in (
            (prevalence.value, recall.value, false_alarm.value),
            (prevalence.low, recall.high, false_alarm.low),
            (prevalence.high, recall.low, false_alarm.high),
        )
    )
    return Rate(value, low, high)


def prevalence_from(blocked: Rate, recall: Rate, false_alarm: Rate) -> Rate | None:
    """The prevalence with the widest interval that the three allow: it rises with q, and falls with r and a. None where the
    filter is not known to tell anything apart.
    """
    try:
        value = prevalence_of(blocked.value, recall.value, false_alarm.value)
    except ValueError:
        return None

    def end(*ends: float) -> float | None:
        try:
            return prevalence_of(*ends)
        except ValueError:
            return None

    low, high = end(blocked.low, recall.high, false_alarm.high), end(blocked.high, recall.low, false_alarm.low)
    return Rate(value, 0.0 if low is None else low, 1.0 if high is None else high)
