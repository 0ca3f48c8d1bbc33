"""The gradients that products are taken with: whether they fit the parameters that are seen."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from .layers import Factors


def checked(
    gradients: Mapping[str, Tensor | Factors], covered: Mapping[str, Tensor], matrices: Collection[str]
) -> tuple[dict[str, Tensor | Factors], int]:
    """Those of the covered parameters, and for how many targets C they are.

    Args:
        gradients, covered, matrices: as of [`~hf_unlearn.influence.in_run.ghost.GhostRecorder`].

    Raises:
        ValueError: a covered parameter is missing, a shape does not fit, or factors of what is no linear layer's weight.
    """
    counts, targets = set(), {}
    for name, parameter in covered.items():
        if name not in gradients:
            raise ValueError(f"gradients: {name} is missing; give all of covered, or choose fewer with layers=")
        gradient = gradients[name]
        if isinstance(gradient, tuple):
            if name not in matrices:
                raise ValueError(
                    f"gradients[{name!r}]: is no weight of linear layers alone; give the gradient, not factors"
                )
            _check_factors(name, gradient, parameter)
            targets[name] = (gradient[0].detach(), gradient[1].detach())
        else:
            shape = tuple(gradient.shape)
            if shape[1:] != parameter.shape:
                raise ValueError(f"gradients[{name!r}]: shape {shape} must be (C, *{tuple(parameter.shape)})")
            targets[name] = gradient.detach()
        counts.add(len(gradient[0] if isinstance(gradient, tuple) else gradient))
    if len(counts) > 1:
        raise ValueError(f"gradients: the number of targets C differs between parameters: {sorted(counts)}")
    return targets, counts.pop()


def _check_factors(name: str, factors: Factors, parameter: Tensor) -> None:
    (rows, columns), shapes = parameter.shape, [tuple(factor.shape) for factor in factors]
    count, *_, rank = shapes[0]
    if shapes != [(count, rows, rank), (count, columns, rank)]:
        raise ValueError(f"gradients[{name!r}]: factors {shapes} must be [(C, {rows}, r), (C, {columns}, r)]")
