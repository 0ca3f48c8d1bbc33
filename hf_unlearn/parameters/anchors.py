"""Parameter space: the reference point θ*, anchors that hold a model near it, repulsion that drives it from another."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .reference import Parameters, at_least_single
from .sharding import own, parts, parts_of, sharded_like, summed


# Anchors work through the parameters in runs of so many elements: small enough for a core's cache, or large enough to
# keep a GPU busy. It bounds their scratch memory too.
RUN_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}


class Anchor(Protocol):
    """A penalty in parameter space. It is pure: it holds no live parameter, so it is given them at each call."""

    def value(self, parameters: Parameters) -> dict[str, Tensor]:
        """Its terms by name, each a scalar in fp32; the penalty is their sum."""

    def add_grad_(self, parameters: Parameters, scale: float = 1.0) -> None:
        """Add `scale` times its gradient to the `.grad` of `parameters`, those that have one."""

    def share_(self, parameters: Parameters, whole: Parameters, shared: Parameters) -> None:
        """Keep of what it holds this process's part, as `parameters` are shared among processes from now on; and of what it has of `whole`, the
        reference point, the part that is in `shared`.
        """


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

    def share_(self, parameters: Parameters, whole: Parameters, shared: Parameters) -> None:
        self.reference = parts_of(self.reference, parameters, whole, shared)
        if self.diagonal is not None:
            self.diagonal = {name: sharded_like(value, parameters[name]) for name, value in self.diagonal.items()}
        self._runs = _runs(self.reference)

    @torch.no_grad()
    def value(self, parameters: Parameters) -> dict[str, Tensor]:
        isotropic, diagonal, like = [], [], next(iter(self.reference.values()))
        for run in self._runs:
            change = torch._foreach_sub(_cut(parameters, run), _cut(self.reference, run))
            isotropic += [norm.square() for norm in torch._foreach_norm(change, 2, at_least_single(change))]
            if self.diagonal is not None:
                torch._foreach_mul_(change, change)
                torch._foreach_mul_(change, _cut(self.diagonal, run))
                diagonal += [term.sum(dtype=at_least_single(change)) for term in change]
        terms = {}
        if self.isotropic or self.diagonal is None:
            terms["isotropic"] = summed(torch.stack(isotropic).sum(), like) * self.isotropic
        if diagonal:
            terms[self.diagonal_name] = summed(torch.stack(diagonal).sum(), like) * self.diagonal_weight
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
    for name, tensor in parts(tensors).items():
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
    held = {name: own(tensors[name]) for name, _, _ in run}
    return [
        held[name] if end - begin == (held[name].shape[:1] or (1,))[0] else held[name][begin:end]
        for name, begin, end in run
    ]


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

    def share_(self, parameters: Parameters, whole: Parameters, shared: Parameters) -> None:
        for anchor in self.anchors:
            anchor.share_(parameters, whole, shared)
