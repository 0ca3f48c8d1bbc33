"""What a check is: one question to every model of an audit, answered by a number in which more is more memory of what was to go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn


# `output`: what anyone sees who may ask the model. `below`: what comes back for who holds its weights, or asks cleverly.
# `distance`: told from retrained models, which says nothing of memory. `beside`: what else was lost, told and not judged.
Layer = Literal["output", "below", "distance", "beside"]
Role = Literal["audited", "original", "retrained"]


@dataclass(frozen=True)
class Reading:
    """What a check found in one model.

    Args:
        value (`float`): more is more memory of the forget data (`distance`: farther away, `beside`: more lost).
        per_example (`tuple[float, ...]`, *optional*): `[n]` values whose mean is `value`, in the order of the rows, which is the same for
            every model: what its interval is made of.
        per_other (`tuple[float, ...]`, *optional*): `[m]` of other rows, where `value` is a mean over pairs of a forget row and one of those (an
            AUC): the mean over the pairs of each.
        error (`float`, *optional*): standard error of `value` over examples, where it is no mean.
        freedom (`int`, *optional*): degrees of freedom of `error`, where it was found from few values; else it counts as known.
        n (`int`, defaults to 0): examples behind it.
        seconds (`float`, defaults to 0): that it took.
        figures (`dict`, defaults to `{}`): what else was found, as JSON values: curves, values at each setting.
    """

    value: float
    per_example: tuple[float, ...] | None = None
    per_other: tuple[float, ...] | None = None
    error: float | None = None
    freedom: int | None = None
    n: int = 0
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def mean_of(cls, per_example: ArrayLike, **figures: Any) -> Reading:
        """Of values by example.

        Raises:
            ValueError: one of them is not finite, or there are none.
        """
        values = np.asarray(per_example, dtype=np.float64).ravel()
        mean = float(values.mean()) if len(values) else float("nan")
        return cls(mean, tuple(values.tolist()), n=len(values), figures=figures).checked()

    @classmethod
    def auc_of(cls, members: ArrayLike, others: ArrayLike, **figures: Any) -> Reading:
        """The share of pairs in which the member has the higher score, ties half: scores `[n]` of forget rows and `[m]` of others.

        Raises:
            ValueError: one of them is not finite, or there are none.
        """
        members, others = (np.asarray(one, dtype=np.float64) for one in (members, others))
        if not (np.isfinite(members).all() and np.isfinite(others).all()):
            raise ValueError("what the model gave is not finite")
        above = (members[:, None] > others[None]) + 0.5 * (members[:, None] == others[None])
        own, other = above.mean(1), above.mean(0)
        return replace(cls.mean_of(own, **figures), per_other=tuple(other.tolist()))

    def checked(self) -> Reading:
        """Itself.

        Raises:
            ValueError: a value that is not finite.
        """
        if not np.isfinite([self.value, *(self.per_example or ()), self.error or 0.0]).all():
            raise ValueError("what the model gave is not finite")
        return self


@dataclass(frozen=True)
class Readings:
    """What a check found in all models.

    Args:
        audited, original ([`Reading`]): the second one is optional.
        retrained (`tuple[Reading, ...]`, defaults to `()`): of models that never saw the forget data.
    """

    audited: Reading
    original: Reading | None = None
    retrained: tuple[Reading, ...] = ()

    def of(self, role: Role) -> tuple[Reading, ...]:
        return (
            self.retrained if role == "retrained" else tuple(one for one in (getattr(self, role),) if one is not None)
        )

    def map(self, function: Callable[[Reading], Reading]) -> Readings:
        original = None if self.original is None else function(self.original)
        return Readings(function(self.audited), original, tuple(map(function, self.retrained)))


class Subject(Protocol):
    """One model of an audit, as its family looks at it.

    Attributes:
        role (`str`): `"audited"`, `"original"` or `"retrained"`.
        name (`str`): what the report calls it: its folder or id, or its role.
        model (`nn.Module`): left as it is by every check.
        digest (`str`): of its weights.
        device (`torch.device`): where it is.
    """

    role: Role
    name: str
    model: nn.Module
    digest: str
    device: torch.device


class AuditData(Protocol):
    """The rows of an audit, as a family prepares them.

    Attributes:
        forgotten (`str`): what was to be forgotten, in words, as in `"class 3"`.
        sizes (`dict[str, int]`): rows of each part that the checks use.
        digest (`str`): of all that the readings depend on.
    """

    forgotten: str
    sizes: Mapping[str, int]
    digest: str


class Check:
    """A check of one family. A class of it says what it measures and overrides `read`.

    Attributes:
        name (`str`): in `checks=`, reports and files.
        title (`str`): what a reader calls it.
        unit (`str`): `"%"` for shares (values in [0, 1]), else of its values.
        margin (`float`): how much more than a retrained model counts as the same, in its unit: stated before anything was measured.
        layer (`str`): see [`Layer`].
        paper (`str`, *optional*): arXiv id of who proposed it.
        what (`str`): what it can show and cannot, in one sentence.
        by_construction (`float`, *optional*): value of retrained models, where that is known without one.
        settle (`str`, *optional*): what would settle it where it is open, if that is not more retrained models.
        is_kept (`bool`): whether what it reads depends on the model and the rows alone, so that another audit need not read it again.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    unit: ClassVar[str] = "%"
    margin: ClassVar[float]
    layer: ClassVar[Layer]
    paper: ClassVar[str | None] = None
    what: ClassVar[str] = ""
    by_construction: ClassVar[float | None] = None
    settle: ClassVar[str | None] = None
    is_kept: ClassVar[bool] = True

    def missing(self, data: Any, roles: Sequence[Role]) -> str | None:
        """Why it cannot be done with such data and models, or None. `roles`: of all the models."""
        return None

    def never_seen(self, data: Any) -> float | None:
        """The value of a model that never saw the forget data, where that is known without one."""
        return None

    def cost(self, data: Any) -> tuple[float, float]:
        """For one model, beyond one look at all rows, which checks share: examples that go forward, and examples that are trained on."""
        return 0, 0

    def read(self, subject: Any, data: Any, seed: int) -> Reading:
        """Look at one model. What is drawn at random is drawn by `seed`, alike for every model; the model stays as it is."""
        raise NotImplementedError

    def settled(self, readings: Readings, data: Any) -> Readings:
        """The final values, where they depend on those of other models; see [`against_others`]."""
        return readings


class AmongRetrained(Check):
    """A check whose value compares a model with retrained ones, each of which is compared with the others: before its other class."""

    def missing(self, data: Any, roles: Sequence[Role]) -> str | None:
        few = roles.count("retrained") < 3
        return "needs 3 retrained models, to compare each with the others" if few else super().missing(data, roles)


def against_others(readings: Readings, value: Callable[[Reading, Sequence[Reading]], Reading]) -> Readings:
    """Readings that compare a model with retrained ones: each retrained model with the *others*, so that one more of them would get
    such a value.

    Args:
        value (callable): of a reading and of the references that it is to be compared with.
    """
    references = readings.retrained

    def others(left_out: int) -> list[Reading]:
        return [one for number, one in enumerate(references) if number != left_out]

    # As many references for the audited model as for each of them: a mean over more is nearer to everything. The last one is left out.
    audited, original = (
        one and value(one, others(len(references) - 1)) for one in (readings.audited, readings.original)
    )
    return Readings(audited, original, tuple(value(one, others(number)) for number, one in enumerate(references)))


def in_order(readings: Readings) -> Iterator[tuple[str, Reading]]:
    """`("audited", …), ("original", …), ("retrained 1", …), …`."""
    yield "audited", readings.audited
    if readings.original is not None:
        yield "original", readings.original
    for number, one in enumerate(readings.retrained):
        yield f"retrained {number + 1}", one


def timed(reading: Reading, seconds: float) -> Reading:
    return replace(reading, seconds=seconds)
