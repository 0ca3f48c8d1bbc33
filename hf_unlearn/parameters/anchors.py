"""Parameter space: the reference point θ*, anchors that hold a model near it, repulsion that drives it from another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..modes import in_eval_mode


Parameters = Mapping[str, Tensor]
# Anchors work through the parameters in runs of so many elements: small enough for a core's cache, or large enough to
# keep a GPU busy. It bounds their scratch memory too.
RUN_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
REPULSIONS = ("el2", "il2", "nl2")
DISTANCES = ("relative", "mean_mse", "sum_squares")


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `model` that training changes, by name; tied parameters appear once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class ReferencePoint:
    """A model's state at one moment (θ* in the papers): trainable parameters and buffers, by name.

    Frozen parameters are not copied: they cannot move. So a LoRA reference costs the size of the adapter, and a full
    one costs the model once, which an anchor then shares.

    Attributes:
        parameters (`dict[str, Tensor]`): trainable parameters, detached copies.
        buffers (`dict[str, Tensor]`): buffers, such as BatchNorm statistics, detached copies.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def capture(cls, model: nn.Module) -> ReferencePoint:
        """Copy the state of `model` as it is now."""
        return cls(
            {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()},
            {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
        )

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Write this state back into `model`, in place.

        Raises:
            ValueError: the model does not have the same trainable parameters.
        """
        parameters, buffers = trainable_parameters(model), dict(model.named_buffers())
        if parameters.keys() != self.parameters.keys():
            odd = sorted(parameters.keys() ^ self.parameters.keys())
            raise ValueError(
                f"model: its trainable parameters are not those of the saved state (first difference: {odd[0]})"
            )
        for name, value in self.parameters.items():
            parameters[name].copy_(value)
        for name, value in self.buffers.items():
            buffers[name].copy_(value)

    @torch.no_grad()
    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run `model` as it was at this point: in eval mode, without gradients, changing nothing in it."""
        with in_eval_mode(model):
            return torch.func.functional_call(model, {**self.parameters, **self.buffers}, args, kwargs)

    def save(self, path: str | Path) -> None:
        """Write to one `.safetensors` file, complete or not at all."""
        tensors = {f"parameter/{k}": v.contiguous() for k, v in self.parameters.items()}
        tensors |= {f"buffer/{k}": v.contiguous() for k, v in self.buffers.items()}
        save_tensors(tensors, path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> ReferencePoint:
        """Read what [`~ReferencePoint.save`] wrote."""
        parts: dict[str, dict[str, Tensor]] = {"parameter": {}, "buffer": {}}
        for key, value in load_file(path).items():  # safetensors 0.8 refuses "cpu:0", which is what gloo runs on
            kind, name = key.split("/", 1)
            parts[kind][name] = value.to(device)
        return cls(parts["parameter"], parts["buffer"])


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a `.safetensors` file through a temporary name, so that a kill never leaves half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, partial, metadata)
    partial.replace(path)


class Anchor(Protocol):
    """A penalty in parameter space. It is pure: it holds no live parameter, so it is given them at each call."""

    def value(self, parameters: Parameters) -> dict[str, Tensor]:
        """Its terms by name, each a scalar in fp32; the penalty is their sum."""

    def add_grad_(self, parameters: Parameters, scale: float = 1.0) -> None:
        """Add `scale` times its gradient to the `.grad` of `parameters`, those that have one."""


class QuadraticAnchor:
    r"""Quadratic penalty around a reference point, with one precision per parameter:

    $$ \sum_i P_i\,(\theta_i - \theta^*_i)^2, \qquad P_i = \beta D_i + \gamma $$

    With the Fisher information as D it is PBU's (arXiv 2403.16246; elastic weight consolidation is the case γ = 0), with
    1/2v, v the variance over checkpoints, VDU's (arXiv 2510.04058). It is a sum over parameters with no ½, as in the
    authors' code, so its size depends on the number of parameters.

    Args:
        reference (`Mapping[str, Tensor]`): θ*, shared, not copied.
        isotropic (`float`): γ ≥ 0.
        diagonal (`Mapping[str, Tensor]`, *optional*): D ≥ 0, same names and shapes as `reference`.
        diagonal_weight (`float`): β ≥ 0.
        diagonal_name (`str`, defaults to `"fisher"`): what D is, for the logs.

    Raises:
        ValueError: a weight is negative, or `diagonal` does not fit `reference`.
    """

    def __init__(
        self,
        reference: Parameters,
        *,
        isotropic: float = 0.0,
        diagonal: Parameters | None = None,
        diagonal_weight: float = 0.0,
        diagonal_name: str = "fisher",
    ):
        if isotropic < 0 or diagonal_weight < 0:
            raise ValueError(
                f"an anchor attracts: isotropic={isotropic}, diagonal_weight={diagonal_weight} must be ≥ 0"
            )
        if diagonal is not None and {k: v.shape for k, v in diagonal.items()} != {
            k: v.shape for k, v in reference.items()
        }:
            raise ValueError(
                "diagonal: names or shapes differ from the reference parameters; compute it on this model"
            )
        self.reference = dict(reference)
        self.isotropic = isotropic
        self.diagonal_weight = diagonal_weight
        self.diagonal_name = diagonal_name
        # Beside γ, not added to it: D can be far smaller, and P = βD + γ would round it away.
        self.diagonal = (
            {k: diagonal[k].to(v.dtype) for k, v in self.reference.items()} if diagonal and diagonal_weight else None
        )
        self._runs = _runs(self.reference)

    @torch.no_grad()
    def value(self, parameters: Parameters) -> dict[str, Tensor]:
        isotropic, diagonal = [], []
        for run in self._runs:
            change = torch._foreach_sub(_cut(parameters, run), _cut(self.reference, run))
            isotropic += [norm.square() for norm in torch._foreach_norm(change, 2, torch.float32)]
            if self.diagonal is not None:
                torch._foreach_mul_(change, change)
                torch._foreach_mul_(change, _cut(self.diagonal, run))
                diagonal += [term.sum(dtype=torch.float32) for term in change]
        terms = {}
        if self.isotropic or self.diagonal is None:
            terms["isotropic"] = torch.stack(isotropic).sum() * self.isotropic
        if diagonal:
            terms[self.diagonal_name] = torch.stack(diagonal).sum() * self.diagonal_weight
        return terms

    @torch.no_grad()
    def add_grad_(self, parameters: Parameters, scale: float = 1.0) -> None:
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        for run in self._runs:
            run = [part for part in run if part[0] in gradients]
            if not run:
                continue
            change = torch._foreach_sub(_cut(parameters, run), _cut(self.reference, run))
            pulled = _cut(gradients, run)
            torch._foreach_add_(pulled, change, alpha=2 * self.isotropic * scale)
            if self.diagonal is not None:
                torch._foreach_addcmul_(
                    pulled, change, _cut(self.diagonal, run), value=2 * self.diagonal_weight * scale
                )


def _runs(tensors: Parameters) -> list[list[tuple[str, int, int]]]:
    """All elements of all tensors, as runs of parts `(name, axis-0 begin, axis-0 end)`. A part is a slice of rows, so that
    any memory layout will do; scalars are one part.
    """
    runs: list[list[tuple[str, int, int]]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        limit = RUN_ELEMENTS.get(tensor.device.type, RUN_ELEMENTS["cuda"])
        rows = tensor.shape[0] if tensor.dim() else 1
        step = max(1, limit * rows // max(tensor.numel(), 1))
        for begin in range(0, rows, step):
            size = tensor.numel() * min(step, rows - begin) // rows
            if runs[-1] and filled + size > limit:
                runs.append([])
                filled = 0
            runs[-1].append((name, begin, min(begin + step, rows)))
            filled += size
    return [run for run in runs if run]


def _cut(tensors: Parameters, run: list[tuple[str, int, int]]) -> list[Tensor]:
    """Views of the parts of a run."""
    return [
        tensors[name] if end - begin == (tensors[name].shape[:1] or (1,))[0] else tensors[name][begin:end]
        for name, begin, end in run
    ]


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
        names = adapted[0].keys()
        if any(one.keys() != names for one in (*adapted, *([reference] if reference is not None else []))):
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
            for (name, _, _), norm in zip(run, torch._foreach_norm(change, 2, torch.float32), strict=True):
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


def average_(average: Parameters, now: Parameters, decay: float, step: int) -> None:
    """One step of an exponential moving average, in place.

    The decay begins low, min(`decay`, (1 + `step`)/(10 + `step`)), so that the average forgets where it began.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.values()), [now[name].detach() for name in average], weight)


class SumOfAnchors:
    """Several anchors as one; terms of the same name are added."""

    def __init__(self, *anchors: Anchor):
        self.anchors = anchors

    def value(self, parameters: Parameters) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        for anchor in self.anchors:
            for name, term in anchor.value(parameters).items():
                terms[name] = terms[name] + term if name in terms else term
        return terms

    def add_grad_(self, parameters: Parameters, scale: float = 1.0) -> None:
        for anchor in self.anchors:
            anchor.add_grad_(parameters, scale)
