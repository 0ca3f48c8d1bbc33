r"""Shadow models: what a way to unlearn leaves of rows that a model was trained on, beside rows that it never saw.

Shadows come in pairs. Both of a pair are trained on all retained rows, and each on half of the forget rows, which it then unlearns: of a row x one of them unlearned it
and the other never saw it. Retraining would make both of one law, so nothing could tell which is which.

U-LiRA (arXiv 2403.01218): the logit margin of x is a Gaussian over shadows that unlearned it and another one over shadows that never saw it. Of a shadow
that neither law was fitted on, the likelihood ratio says whether x was unlearned. The swap test (arXiv 2404.11577) asks which of the two of a pair has the greater margin, as often
for rows of one as of the other, so that a model that is surer of all rows gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from ...ensembles import train_ensemble
from ...files import first_line
from ...modes import seeded_generator
from ...training.checks import shown
from ..check import Check, Reading, Readings, Role
from ..digests import digest_of
from ..functions import Functions
from ..given import Handed
from ..store import Store
from .data import BYTES, ClassifierData, Part, read_part
from .distances import margins_of
from .membership import found_at_few_alarms
from .subject import ClassifierSubject, look_at


SHADOWS, LEAST = 8, 6  # made by default, and at least: two other pairs give each law a spread
ROWS = 8  # forget rows, of which halves mean something
OF_ITS_OWN = 16  # shadows of a kind from which on each row has a spread of its own, as in the paper; else all have one
SMALL = {
    "epochs": 30,
    "batch_size": 32,
    "lr": 1e-3,
    "optimizer": "adamw",
    "schedule": "linear",
}  # of what is trained here


@dataclass(frozen=True)
class Found:
    """Logit margins of the forget rows.

    Attributes:
        before, after (`array`): `[shadows, n]`: of the shadows, and once they have unlearned the rows that they were trained on.
        seen (`array`): `[shadows, n]`, bool: the rows that each was trained on.
    """

    before: NDArray[np.float64]
    after: NDArray[np.float64]
    seen: NDArray[np.bool_]


class Trials:
    """Unlearning, tried on shadow models, which are made and looked at one after the other when a check first asks.

    Args:
        sources (sequence of `(source, rows)`): two by two; a source is as of [`Handed`].
        functions ([`Functions`]), part ([`Part`]), places (`Tensor`): the rows that are looked at, and their numbers in the forget set.
        subject ([`ClassifierSubject`]): the audited model, whose labels shadows must have.
        store ([`Store`]): for what was found.
        made (`int`): how many of them `train_fn` makes.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Any, Sequence[int]]],
        functions: Functions,
        part: Part,
        places: Tensor,
        check_alike: Callable[[ClassifierSubject, str], None],
        store: Store,
        made: int = 0,
    ):
        self.sources, self.functions, self.part, self.places = sources, functions, part, places
        self.check_alike, self.store, self.made = check_alike, store, made
        self._found: Found | Exception | None = None

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def found(self) -> Found:
        """Of all shadows.

        Raises:
            ValueError: one could not be made or unlearned; said again to every check that asks.
        """
        if self._found is None:
            try:
                self._found = self._try()
            except Exception as error:
                self._found = error
        if isinstance(self._found, Exception):
            raise ValueError(first_line(self._found)) from self._found
        return self._found

    def _try(self) -> Found:
        seen = np.stack([np.isin(self.places.numpy(), np.asarray(rows)) for _, rows in self.sources])
        before, after, key = [], [], None
        for number, (source, rows) in enumerate(self.sources):
            kept = self.store.values("shadows", key or "", str(number)) if key else None
            if kept is None:
                one, two, digest = self._margins(source, rows, number)
                # Functions have no digest: what they make of the first shadow stands for them, which is therefore made every time.
                key = key or digest
                self.store.keep_values(
                    kept := {"before": one.tolist(), "after": two.tolist()}, "shadows", key, str(number)
                )
            before.append(kept["before"])
            after.append(kept["after"])
        found = Found(np.array(before), np.array(after), seen)
        if not (np.isfinite(found.before).all() and np.isfinite(found.after).all()):
            raise ValueError("what a shadow model gave is not finite")
        return found

    def _margins(self, source: Any, rows: Sequence[int], number: int) -> tuple[NDArray, NDArray, str]:
        handed = Handed(f"shadows[{number}]", "original", source)
        with handed.opened() as subject:
            self.check_alike(subject, handed.argument)
            before = margins_of(look_at(subject.model, self.part, features=False))
            unlearned = self.functions.unlearned(subject.model, rows, 1, number)
            after = margins_of(look_at(unlearned, self.part, features=False))
            return before, after, digest_of(unlearned)


def trials(
    audited: ClassifierSubject,
    functions: Functions,
    shadows: Any,
    *,
    check_alike: Callable[[ClassifierSubject, str], None],
    processing_class: Any,
    limit: int,
    store: Store,
) -> Trials | None:
    """[`Trials`] of an audit, with shadows that were given, or that `train_fn` makes, or that are trained here many at once. None where there are too few
    forget rows.

    Raises:
        ValueError: shadows that are no pairs of models and rows, or a model that cannot be trained here.
    """
    count, seed = len(functions.forget), functions.seed
    if count < ROWS:
        return None
    drawn = torch.randperm(count, generator=seeded_generator("cpu", seed, 50))[:limit].sort().values
    part = read_part(functions.forget, drawn.tolist(), processing_class)
    settings = {"functions": functions, "part": part, "places": drawn, "check_alike": check_alike, "store": store}
    if shadows is not None and not isinstance(shadows, int):
        return Trials(_checked(list(shadows), count), **settings)
    number = SHADOWS if shadows is None else shadows
    if isinstance(number, bool) or number < LEAST or number % 2:
        raise ValueError(
            f"shadows={shown(number)}: must be an even number, at least {LEAST}: two by two they have the halves of the forget rows"
        )
    halves = _halves(count, number, seed)
    if functions.train_fn is not None:
        made = [(partial(functions.trained, rows, 1, k), rows) for k, rows in enumerate(halves)]
        return Trials(made, **settings, made=number)
    train = Batched(audited.model, functions, halves, processing_class)
    return Trials([(partial(train.model, k), rows) for k, rows in enumerate(halves)], **settings)


class Batched:
    """Shadows of a small model, trained together from scratch when the first one is asked for.

    Raises:
        ValueError: models of its class cannot be trained so.
    """

    def __init__(self, model: nn.Module, functions: Functions, halves: Sequence[Sequence[int]], processing_class: Any):
        self.like, self.functions, self.halves, self.processing_class = model, functions, halves, processing_class
        self._state: dict[str, Tensor] | None = None
        # All shadows have the same rows to keep, and of the others those of their half.
        self.part = read_part(functions.retain, [0, 1], processing_class)
        size = sum(value[0].numel() * value.element_size() for value in self.part.inputs.values())
        try:
            if size * (len(functions.retain) + len(functions.forget)) > BYTES:
                raise ValueError("its rows are too large to be held at once")
            if len(self.part.inputs) != 1:
                raise ValueError(f"it takes {' and '.join(self.part.inputs)}")
            self._train(self.part, [[0, 1]], max_steps=1, batch_size=2)
        except Exception as error:  # of a model that no batch of models can be made of
            raise ValueError(
                f"shadows: {type(model).__name__} cannot be trained here, many at once ({first_line(error)}); pass train_fn=, or shadows="
            ) from error

    def model(self, number: int) -> nn.Module:
        if self._state is None:
            forget, retain = (
                read_part(rows, range(len(rows)), self.processing_class)
                for rows in (self.functions.forget, self.functions.retain)
            )
            kept = torch.arange(len(forget), len(forget) + len(retain))
            members = [torch.cat([torch.as_tensor(rows), kept]) for rows in self.halves]
            self._state = self._train(forget + retain, members, **SMALL)
        made = self._fresh(0)
        made.load_state_dict({name.removeprefix("model."): value[number] for name, value in self._state.items()})
        return made.eval()

    def _train(self, part: Part, members: Sequence[Any], **settings: Any) -> dict[str, Tensor]:
        (inputs,) = part.inputs.values()
        device = next(self.like.parameters()).device
        seeds = [self.functions.seed * 1000 + number for number in range(len(members))]
        settings = {"lr": 1e-3, **settings}
        name = next(iter(part.inputs))
        return train_ensemble(
            lambda seed: _Logits(self._fresh(seed), name),
            inputs.to(device),
            part.labels.to(device),
            members,
            seeds,
            **settings,
        )

    def _fresh(self, seed: int) -> nn.Module:
        config = getattr(self.like, "config", None)
        try:
            return type(self.like)(config)
        except TypeError:
            return type(self.like)()


class _Logits(nn.Module):
    """A classifier as a function of one tensor."""

    def __init__(self, model: nn.Module, name: str):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(**{self.name: inputs}).logits


class OnShadows(Check):
    """A check of the way to unlearn, by shadow models: the reading of the audited model is of shadows that unlearned, that of the original of the same before."""

    settle = "more shadow models (shadows=), or more forget examples"
    is_kept: ClassVar[bool] = False  # it depends on functions

    def missing(self, data: ClassifierData, roles: Sequence[Role]) -> str | None:
        return None if data.trials is not None else data.no_trials

    def read(self, subject: ClassifierSubject, data: ClassifierData, seed: int) -> Reading:
        if subject.role == "retrained":
            return Reading(self.by_construction)
        found = data.trials.found
        return self.told(found.after if subject.role == "audited" else found.before, found.seen)

    def settled(self, readings: Readings, data: ClassifierData) -> Readings:
        """The shadows tell what the original would have given, also where it is not there."""
        found = data.trials.found
        return replace(readings, original=readings.original or self.told(found.before, found.seen))

    def told(self, margins: NDArray, seen: NDArray) -> Reading:
        """Of margins `[shadows, n]` and the rows that each shadow was trained on."""
        raise NotImplementedError


class UnlearningLiRA(OnShadows):
    name, title, unit, margin, layer = "unlearning_lira", "Membership by U-LiRA", "AUC", 0.1, "distance"
    paper, by_construction = "2403.01218", 0.5
    what = (
        "Whether a row's logit margin tells, in shadow models, those that unlearned it from those that never saw it: who knows the way to unlearn, and shadows, needs only answers. "
        "Rows that are driven further than unseen ones are told, too."
    )

    def told(self, margins: NDArray, seen: NDArray) -> Reading:
        areas, members, others = [], [], []
        for pair in range(0, len(margins), 2):
            both = []
            for target in (pair, pair + 1):
                apart = np.setdiff1d(np.arange(len(margins)), [pair, pair + 1])
                ratio = likelihood_ratio(margins[target], margins[apart], seen[apart])
                known = np.isfinite(ratio)
                one, two = ratio[known & seen[target]], ratio[known & ~seen[target]]
                if not len(one) or not len(two):
                    raise ValueError("too few other shadows were trained with and without the same rows")
                both.append(Reading.auc_of(one, two).value)
                members.append(one)
                others.append(two)
            areas.append(np.mean(both))
        figures = {
            "by_pair": [float(area) for area in areas],
            **found_at_few_alarms(np.concatenate(members), np.concatenate(others)),
        }
        # What tells pair p by pair q tells q by p: areas of P pairs are correlated, and where nothing is told the variance of their mean is
        # 2 (P − 1) / P of that of such a product, where their own spread shows (P − 2) / P.
        pairs = len(areas)
        return _of_pairs(areas, margins.shape[1], figures, (2 * (pairs - 1) / (pairs - 2)) ** 0.5)


class SwapTest(OnShadows):
    name, title, margin, layer = "swap_test", "Swap test", 0.2, "below"  # an area of 0.6, as the margin of areas is
    paper, by_construction = "2404.11577", 0.0
    what = (
        "Of two shadow models, one of which unlearned a row that the other never saw, whether the surer of it is the one that unlearned it: right guesses less wrong ones, "
        "in both roles. Of retraining it is 0, whatever the data; below 0 where unlearning goes further."
    )

    def told(self, margins: NDArray, seen: NDArray) -> Reading:
        advantages = [
            swap_advantage(*(values[[pair, pair + 1]] for values in (margins, seen)))
            for pair in range(0, len(margins), 2)
        ]
        return _of_pairs(advantages, margins.shape[1], {"by_pair": [float(one) for one in advantages]})


def likelihood_ratio(observed: NDArray, margins: NDArray, seen: NDArray) -> NDArray[np.float64]:
    r"""$\log N(m; \mu_u, \sigma_u) - \log N(m; \mu_n, \sigma_n)$ of each row, of Gaussians over other models that unlearned it and that never saw it.

    Below [`OF_ITS_OWN`] models of a kind all rows have one σ, the root of their mean variance.

    Args:
        observed (`array`): `[n]` margins m of the model in question.
        margins (`array`), seen (`array` of `bool`): `[models, n]`: of the others, and which of them were trained on the row (and unlearned it).

    Returns:
        `array`: `[n]`, NaN where there are fewer than two models of a kind.
    """
    laws = []
    for mask in (seen, ~seen):
        count = mask.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(mask, margins, 0.0).sum(0) / count
            variance = np.where(mask, (margins - mean) ** 2, 0.0).sum(0) / (count - 1)
        enough = count > 1
        if enough.any() and count[enough].min() < OF_ITS_OWN:
            variance = np.where(enough, variance[enough].mean(), np.nan)
        laws.append(stats.norm.logpdf(observed, np.where(enough, mean, np.nan), np.sqrt(np.maximum(variance, 1e-12))))
    return laws[0] - laws[1]


def swap_advantage(margins: NDArray, seen: NDArray) -> float:
    """Right guesses less wrong ones of who takes the model with the greater margin for the one that was trained on the row (and unlearned it), as
    much from rows of one as of the other.

    Args:
        margins (`array`), seen (`array` of `bool`): `[2, n]` of the two models.
    """
    surer = np.sign(margins[0] - margins[1])
    return float((surer[seen[0] & ~seen[1]].mean() - surer[seen[1] & ~seen[0]].mean()) / 2)


def _of_pairs(values: Sequence[float], rows: int, figures: dict[str, Any], wider: float = 1.0) -> Reading:
    """A mean over pairs of shadows, which differ by their rows, their training and their unlearning."""
    error = wider * float(np.std(values, ddof=1) / len(values) ** 0.5)
    return Reading(float(np.mean(values)), error=error, freedom=len(values) - 1, n=rows, figures=figures).checked()


def _halves(count: int, number: int, seed: int) -> list[list[int]]:
    """Halves of the rows, two by two one and the other."""
    found = []
    for pair in range(number // 2):
        order = torch.randperm(count, generator=seeded_generator("cpu", seed, 51, pair))
        found += [half.sort().values.tolist() for half in order.tensor_split([count // 2])]
    return found


def _checked(shadows: Sequence[Any], count: int) -> list[tuple[Any, list[int]]]:
    """Shadows that were given.

    Raises:
        ValueError: what is no pair of a model and rows, rows that are not there, too few of them, or two that were trained on the same.
    """
    found = []
    for number, one in enumerate(shadows):
        if not isinstance(one, tuple | list) or len(one) != 2:
            raise ValueError(
                f"shadows[{number}]: {type(one).__name__} is no pair (model, rows of forget that it was trained on)"
            )
        model, rows = one
        rows = np.unique(np.asarray(rows, dtype=np.int64))
        if not len(rows) or rows[0] < 0 or rows[-1] >= count:
            raise ValueError(
                f"shadows[{number}]: its rows must be numbers of rows of forget, 0 to {count - 1}, and some"
            )
        found.append((model, rows.tolist()))
    if len(found) < LEAST or len(found) % 2:
        raise ValueError(f"shadows: {len(found)} models; pass an even number of them, at least {LEAST}")
    for pair in range(0, len(found), 2):
        one, two = (set(rows) for _, rows in found[pair : pair + 2])
        if not one - two or not two - one:
            raise ValueError(
                f"shadows[{pair}] and [{pair + 1}]: each must have been trained on rows that the other was not; pass halves, two by two"
            )
    return found
