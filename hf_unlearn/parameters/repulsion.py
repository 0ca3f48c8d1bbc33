"""Repulsion from other parameters, in closed form (Adapt-then-Unlearn), and extrapolation away from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .anchors import _cut, _runs
from .reference import Parameters, at_least_single


REPULSIONS = ("el2", "il2", "nl2")


DISTANCES = ("relative", "mean_mse", "sum_squares")


class Repulsion:
    r"""Pushes parameters away from adapted models θ_N,1…K, those that draw or say what is to be forgotten
    (Adapt-then-Unlearn, arXiv 2309.14054, §3.2):

    $$ \gamma\, g(d), \qquad d = \frac1K \sum_k \sum_i w_i\,(\theta_i - \theta_{N,k,i})^2 $$

    with $g(d) = e^{-\alpha d}$ (`"el2"`), $1/d$ (`"il2"`) or $-d$ (`"nl2"`). The K models enter by their mean and their spread
    alone, so that they cost the memory of one.

    Args:
        adapted (`Sequence[Mapping[str, Tensor]]`): θ_N, one or more.
        kind (`"el2"` | `"il2"` | `"nl2"`): g.
        weight (`float`): γ ≥ 0.
        rate (`float`): α > 0, of `"el2"` only.
        distance (`"relative"` | `"mean_mse"` | `"sum_squares"`): w: `"sum_squares"`, as the paper writes it, has w = 1;
            `"mean_mse"`, as its code computes it, is the mean over tensors of the mean over a tensor's elements; `"relative"`
            divides the sum of squares by what it is at `reference`, so that d = 1 where unlearning begins and γ and α
            mean the same for every model.
        reference (`Mapping[str, Tensor]`, *optional*): θ_G, for `"relative"` only.

    Raises:
        ValueError: an unknown name, a weight out of range, no model, names that differ, or an adapted model that is the
            reference itself.
    """

    def __init__(
        self,
        adapted: Sequence[Parameters],
        *,
        kind: str = "el2",
        weight: float = 1.0,
        rate: float = 1.0,
        distance: str = "relative",
        reference: Parameters | None = None,
    ):
        if kind not in REPULSIONS or distance not in DISTANCES:
            raise ValueError(
                f"repulsion={kind!r}, distance={distance!r}: must be one of {', '.join(REPULSIONS)} and one of "
                f"{', '.join(DISTANCES)}"
            )
        if weight < 0 or rate <= 0:
            raise ValueError(f"repulsion: its weight={weight} must be ≥ 0 and its rate={rate} > 0")
        if not adapted:
            raise ValueError("adapted: no model to be repelled by; pass one or more")
        # In one order, whatever order a file gives them in: a resumed run sums as the first one did.
        names = sorted(adapted[0])
        if any(sorted(one) != names for one in (*adapted, *([reference] if reference is not None else []))):
            raise ValueError("adapted: the models' parameters have different names; adapt this very model")
        if distance == "relative" and reference is None:
            raise ValueError("reference: missing; distance='relative' needs the model that unlearning starts from")
        self.kind, self.weight, self.rate = kind, weight, rate
        count = len(adapted)
        self.mean = {name: sum(one[name].detach() for one in adapted) / count for name in names}
        self.weights = dict.fromkeys(names, 1.0)
        if distance == "mean_mse":
            self.weights = {name: 1 / (len(names) * value.numel()) for name, value in self.mean.items()}
        self._runs = _runs(self.mean)
        self.spread = torch.zeros((), device=next(iter(self.mean.values())).device)
        if count > 1:
            self.spread = sum(self.distance(one) for one in adapted) / count
        if distance == "relative":
            start = self.distance(reference).item()
            if not start > 0:
                raise ValueError(
                    "adapted: equals the model it was adapted from, so there is no way to be pushed; adapt longer"
                )
            self.weights = dict.fromkeys(names, 1 / start)
            self.spread = self.spread / start

    @torch.no_grad()
    def distance(self, parameters: Parameters) -> Tensor:
        """d, a scalar in fp32."""
        squares = []
        for run in self._runs:
            change = torch._foreach_sub(_cut(parameters, run), _cut(self.mean, run))
            for (name, _, _), norm in zip(run, torch._foreach_norm(change, 2, at_least_single(change)), strict=True):
                squares.append(norm.square() * self.weights[name])
        return torch.stack(squares).sum() + self.spread

    def value(self, parameters: Parameters) -> dict[str, Tensor]:
        d = self.distance(parameters)
        g = {"el2": lambda: torch.exp(-self.rate * d), "il2": lambda: 1 / d, "nl2": lambda: -d}[self.kind]()
        return {"repulsion": self.weight * g}

    @torch.no_grad()
    def add_grad_(self, parameters: Parameters, scale: float = 1.0) -> None:
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        slope = 2 * scale * self.weight * self._derivative(parameters)
        for run in self._runs:
            run = [part for part in run if part[0] in gradients]
            if not run:
                continue
            change = torch._foreach_sub(_cut(parameters, run), _cut(self.mean, run))
            torch._foreach_mul_(change, slope)
            if len(set(self.weights.values())) > 1:
                torch._foreach_mul_(change, [self.weights[name] for name, _, _ in run])
                weight = 1.0
            else:
                weight = self.weights[run[0][0]]
            torch._foreach_add_(_cut(gradients, run), change, alpha=weight)

    def _derivative(self, parameters: Parameters) -> Tensor | float:
        """g'(d)."""
        if self.kind == "nl2":
            return torch.full_like(self.spread, -1.0)
        d = self.distance(parameters)
        return -self.rate * torch.exp(-self.rate * d) if self.kind == "el2" else -1 / d.square()


def extrapolate(reference: Parameters, adapted: Parameters, scale: float) -> dict[str, Tensor]:
    """θ_G + `scale` (θ_N − θ_G): beyond the original, away from the adapted model, for `scale` < 0 (arXiv 2309.14054, §3.1)."""
    return {
        name: torch.lerp(value.detach(), adapted[name].detach().to(value), scale) for name, value in reference.items()
    }
