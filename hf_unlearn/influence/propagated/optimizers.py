"""One optimiser step as a function of flat vectors, and its adjoint: what the reverse sweep carries influence through.

State θ and the optimiser's own vectors; a step maps them and the gradient g to the next ones. The adjoint maps cotangents λ of
the next state to cotangents of this state and of g. Cotangents are `[vectors, parameters]`. For AdamW
the adjoint is also that of AdamW-influence (arXiv 2605.18814).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


State = tuple[Tensor, ...]  # θ, then the optimiser's vectors, `[parameters]` each


@dataclass(frozen=True)
class StepSettings:
    """What one step of the run used.

    Attributes:
        count (`int`): steps taken before this one.
        groups (`list[dict]`): settings of each parameter group.
        max_norm (`float`): gradients were clipped to this norm; 0 for none.
    """

    count: int
    groups: list[dict[str, Any]]
    max_norm: float


def clip(gradient: Tensor, max_norm: float) -> Tensor:
    """g·min(1, c/(‖g‖+10⁻⁶)), as `torch.nn.utils.clip_grad_norm_`."""
    if not max_norm:
        return gradient
    return gradient * (max_norm / (gradient.norm() + 1e-6)).clamp(max=1)


def clip_adjoint(gradient: Tensor, cotangent: Tensor, max_norm: float) -> Tensor:
    """Cotangent of g from that of the clipped g."""
    if not max_norm:
        return cotangent
    norm = gradient.norm()
    scale = max_norm / (norm + 1e-6)
    if scale >= 1:
        return cotangent
    radial = (cotangent @ gradient) / (norm * (norm + 1e-6))
    return scale * (cotangent - radial[:, None] * gradient)


class FlatOptimizer:
    """An optimiser of the run, seen as a map of flat vectors.

    Args:
        optimizer (`torch.optim.Optimizer`): SGD, Adam or AdamW.
        parameters (`Sequence[Tensor]`): the trainable ones, in the order of the flat vector.

    Raises:
        ValueError: another optimiser, one of its options is not supported, or it leaves parameters out.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]):
        kind = type(optimizer)
        if kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
            raise ValueError(
                f"optim: {kind.__name__} cannot be carried influence through (SGD, Adam and AdamW of torch can); choose one of "
                "them, or observation='in_run'"
            )
        for group in optimizer.param_groups:
            if odd := [name for name in ("maximize", "amsgrad", "differentiable") if group.get(name)]:
                raise ValueError(f"optim: {odd[0]}=True is not supported by observation='propagated'; leave it out")
        self.kind = "sgd" if kind is torch.optim.SGD else "adam"
        self.optimizer, self.parameters = optimizer, list(parameters)
        owner = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
        if any(id(p) not in owner for p in self.parameters):
            raise ValueError("optim: holds not all trainable parameters; freeze the others with requires_grad_(False)")
        self.owner = [owner[id(p)] for p in self.parameters]
        self.decoupled = kind is torch.optim.AdamW
        self.names = ("momentum_buffer",) if self.kind == "sgd" else ("exp_avg", "exp_avg_sq")
        if self.kind == "sgd" and not any(group["momentum"] for group in optimizer.param_groups):
            self.names = ()

    def state(self) -> State:
        """θ and the optimiser's vectors now, copied and flat."""
        vectors = [torch.cat([p.detach().flatten() for p in self.parameters])]
        for name in self.names:
            parts = [self.optimizer.state.get(p, {}).get(name) for p in self.parameters]
            vectors.append(
                torch.cat(
                    [
                        (torch.zeros_like(p) if part is None else part).flatten()
                        for p, part in zip(self.parameters, parts, strict=True)
                    ]
                )
            )
        return tuple(vectors)

    def settings(self, max_norm: float) -> StepSettings:
        """Those of the step that comes next."""
        counts = [self.optimizer.state.get(p, {}).get("step", 0) for p in self.parameters]
        if self.kind == "sgd":  # keeps no count; only whether there has been a step matters
            count = int(
                any(self.optimizer.state.get(p, {}).get("momentum_buffer") is not None for p in self.parameters)
            )
        else:
            count = int(max(float(count) for count in counts))
        keys = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "betas", "eps")
        groups = [{key: group[key] for key in keys if key in group} for group in self.optimizer.param_groups]
        for group in groups:
            group["lr"] = float(group["lr"])
        return StepSettings(count, groups, max_norm)

    def _each(self, settings: StepSettings, name: str) -> Tensor | float:
        """A setting for every element, or one number where all groups agree."""
        values = [settings.groups[index][name] for index in self.owner]
        if len(set(values)) == 1:
            return values[0]
        return torch.cat([p.new_full((p.numel(),), value) for p, value in zip(self.parameters, values, strict=True)])

    def step(self, state: State, gradient: Tensor, settings: StepSettings) -> State:
        """The next state."""
        return self._sgd(state, gradient, settings) if self.kind == "sgd" else self._adam(state, gradient, settings)

    def reach(self, state: State, gradient: Tensor, settings: StepSettings) -> Tensor | float:
        """Share of λ^g that holds for examples that were not in the batch, for every element.

        Adam divides by √v̂, and where no batch has had a gradient yet v̂ is 0: an example that has one would be the first, and
        would make v̂ what it is later. So λ^g is that of the v̂ at the end of the run where that is larger.
        """
        if self.kind == "sgd":
            return 1.0
        _, beta2, _, c2 = self._moments(settings)
        now = (beta2 * state[2] + (1 - beta2) * clip(gradient, settings.max_norm).square()) / c2
        later = self.state()[2] / (1 - beta2 ** max(1, self.settings(0.0).count))
        return torch.where(later > now, (now / later).sqrt(), 1.0)

    def adjoint(
        self, state: State, gradient: Tensor, settings: StepSettings, cotangents: State
    ) -> tuple[State, Tensor]:
        """Cotangents of this state and of the gradient, from those of the next state."""
        run = self._sgd_adjoint if self.kind == "sgd" else self._adam_adjoint
        before, of_clipped = run(state, clip(gradient, settings.max_norm), settings, cotangents)
        return before, clip_adjoint(gradient, of_clipped, settings.max_norm)

    # θ' = θ − η u, with d = g + wd·θ, b' = μ b + (1−τ) d (the first step: b' = d), u = b' or d + μ b' (Nesterov)

    def _sgd(self, state: State, gradient: Tensor, settings: StepSettings) -> State:
        theta = state[0]
        lr, decay = self._each(settings, "lr"), self._each(settings, "weight_decay")
        d = clip(gradient, settings.max_norm) + decay * theta
        if not self.names:
            return (theta - lr * d,)
        momentum, dampening = self._each(settings, "momentum"), self._each(settings, "dampening")
        buffer = d if settings.count == 0 else momentum * state[1] + (1 - dampening) * d
        update = d + momentum * buffer if self._nesterov(settings) else buffer
        return theta - lr * update, buffer

    def _sgd_adjoint(self, state, gradient, settings, cotangents):
        lr, decay = self._each(settings, "lr"), self._each(settings, "weight_decay")
        of_update = -lr * cotangents[0]
        if not self.names:
            return (cotangents[0] + decay * of_update,), of_update
        momentum, dampening = self._each(settings, "momentum"), self._each(settings, "dampening")
        nesterov, first = self._nesterov(settings), settings.count == 0
        of_buffer = cotangents[1] + (momentum * of_update if nesterov else of_update)
        of_d = of_buffer if first else (1 - dampening) * of_buffer
        if nesterov:
            of_d = of_d + of_update
        before = torch.zeros_like(of_buffer) if first else momentum * of_buffer
        return (cotangents[0] + decay * of_d, before), of_d

    @staticmethod
    def _nesterov(settings: StepSettings) -> bool:
        return bool(settings.groups[0]["nesterov"])

    # m' = β₁ m + (1−β₁) d, v' = β₂ v + (1−β₂) d², θ' = (1 − η wd) θ − η m̂'/(√v̂' + ε); Adam: d = g + wd·θ and no decay outside

    def _moments(self, settings: StepSettings) -> tuple[float, float, float, float]:
        beta1, beta2 = settings.groups[0]["betas"]
        return beta1, beta2, 1 - beta1 ** (settings.count + 1), 1 - beta2 ** (settings.count + 1)

    def _adam(self, state: State, gradient: Tensor, settings: StepSettings) -> State:
        theta, m, v = state
        lr, decay, eps = (self._each(settings, name) for name in ("lr", "weight_decay", "eps"))
        beta1, beta2, c1, c2 = self._moments(settings)
        d = clip(gradient, settings.max_norm)
        if not self.decoupled:
            d = d + decay * theta
        m, v = beta1 * m + (1 - beta1) * d, beta2 * v + (1 - beta2) * d * d
        kept = (1 - lr * decay) * theta if self.decoupled else theta
        return kept - lr * (m / c1) / ((v / c2).sqrt() + eps), m, v

    def _adam_adjoint(self, state, gradient, settings, cotangents):
        theta, m, v = state
        lr, decay, eps = (self._each(settings, name) for name in ("lr", "weight_decay", "eps"))
        beta1, beta2, c1, c2 = self._moments(settings)
        d = gradient if self.decoupled else gradient + decay * theta
        m, v = beta1 * m + (1 - beta1) * d, beta2 * v + (1 - beta2) * d * d
        root = (v / c2).sqrt()
        scale = root + eps
        of_update = -lr * cotangents[0]
        of_m = cotangents[1] + of_update / (c1 * scale)
        # Where v = 0 no gradient has ever come, m is 0 too, and the square root has no slope to speak of.
        slope = torch.where(v > 0, -(m / c1) / (2 * c2 * root * scale * scale), 0)
        of_v = cotangents[2] + of_update * slope
        of_d = (1 - beta1) * of_m + (2 * (1 - beta2)) * d * of_v
        of_theta = cotangents[0] + (decay * of_update if self.decoupled else decay * of_d)
        return (of_theta, beta1 * of_m, beta2 * of_v), of_d
