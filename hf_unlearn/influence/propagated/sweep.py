r"""Influence carried to the end of training: a reverse sweep of Hessian-vector products over the run's own steps.

A step maps the state s_t (θ and the optimiser's vectors) and the batch gradient g_t = Σ_i q_i ∇ℓ_i(θ_t) to s_{t+1}. With λ_T the
gradient of a target's loss at the end, the chain rule carries it back,

$$ \lambda_t = \Big(\frac{\partial s_{t+1}}{\partial s_t}\Big)^{\!\top} \lambda_{t+1} + H_t\, \lambda^g_t, \qquad
   \lambda^g_t = \Big(\frac{\partial s_{t+1}}{\partial g_t}\Big)^{\!\top} \lambda_{t+1}, $$

H_t the Hessian of the batch's loss (for plain SGD λ^g = −ηλ_{t+1} and λ_t = λ_{t+1} − ηH_tλ_{t+1}), and the observation of example i is
the gain a_{t,i} = −⟨λ^g_t, ∇ℓ_i(θ_t)⟩: what its presence in the step is worth to the target in the end.

Both products come out of one backward pass through the gradient: ∂/∂θ of ⟨g, λ^g⟩ is H λ^g, and ∂/∂q_i of it is ⟨∇ℓ_i, λ^g⟩. So every
layer is seen that autograd can differentiate twice, and all targets go together.

The exact reverse sweep through a training run is REPLAY's (arXiv 2503.13751) and MAGIC's (arXiv 2504.16430); unrolling for the
law of outputs over runs is d-TDA's (arXiv 2506.12965). Ours are σ from the same sweep, the window, and the law of shuffled epochs.

Two cotangents are carried for each target. That of its mean loss over the last `window` steps gives the observations: it is
the same influence with much less of the last steps' noise. That of the last step's loss gives σ², the variance over batches
of the loss that is really left: Σ_t Var_i(a_{t,i}) / b, less what an epoch's batches have in common (see `shuffling`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..report.observations import step_statistics
from ..report.shuffling import Panel
from ..targets import Batch, OwnTargets, PerExampleLoss, Targets, batched_grad, own_gains
from .optimizers import FlatOptimizer, State
from .trajectory import MicroBatch, Trajectory, set_random_states


class Sweep:
    """The reverse sweep over a run that has ended.

    Args:
        model (`nn.Module`): as it is at the end of the run; its parameters are moved about and put back.
        optimizer (`FlatOptimizer`): of the run.
        trajectory (`Trajectory`): of the run.
        targets (`Targets`): what influence is measured on.
        per_example: model, batch → losses `[batch]` and weights `[batch]`, as the run took them.
        window (`int`): last steps over which a target's loss is averaged; 1 takes the end of the run alone.
        every (`int`, defaults to 1): steps between two looks within the window.
        panel (`Panel`, *optional*): is shown the gains, of which σ² is the variance, of `rows` at some steps.
        rows (iterable of batches, *optional*): the examples of the panel, gone through anew at each of its looks.
        keep (`int`, *optional*): step before which λ of the last step's loss is kept, in `kept`, `[targets, parameters]`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: FlatOptimizer,
        trajectory: Trajectory,
        targets: Targets,
        per_example: PerExampleLoss,
        *,
        window: int,
        every: int = 1,
        panel: Panel | None = None,
        rows: Iterable[Batch] = (),
        keep: int | None = None,
    ):
        self.model, self.optimizer, self.trajectory = model, optimizer, trajectory
        self.targets, self.per_example = targets, per_example
        self.window, self.every, self.panel, self.rows = max(1, window), every, panel, rows
        self.keep, self.kept = keep, None
        self.parameters: Sequence[Tensor] = optimizer.parameters
        self.device = self.parameters[0].device
        # torch cannot batch the second derivative of a group norm, and of one group of one example does it wrong without a word.
        self.at_once = 1 if any(isinstance(module, nn.GroupNorm) for module in model.modules()) else 64

    def run(self, steps: int, record: Callable[..., None]) -> None:
        """Sweep from step `steps − 1` down to the first one that was kept.

        Args:
            steps (`int`): optimiser steps of the run.
            record: is given step, the examples `[batch]` that have predictions, their weights `[batch]`, observations
                `[batch, targets]`, σ² `[targets]` (of examples that are their own targets `[batch, 3]`, see
                [`own_gains`], and None) and margins `[batch]`.

        Raises:
            FloatingPointError: a cotangent is not finite.
        """
        end = [p.detach().clone() for p in self.parameters]
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        try:
            with (
                torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []),
                sdpa_kernel(SDPBackend.MATH),
            ):
                self._run(steps, record)
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, end, strict=True):
                    parameter.copy_(value)
                for buffer, value in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(value)

    def _run(self, steps: int, record) -> None:
        first, own = self.trajectory.start, isinstance(self.targets, OwnTargets)
        # θ_t for these t, and the end itself, are the states that the window averages over.
        looks = set(range(steps - self.every, max(steps - self.window, first), -self.every))
        share = 1 / (len(looks) + 1)
        at_end = self.targets.gradients(self.model, self.parameters)
        count = len(at_end)
        cotangents: State = (at_end * share if own else torch.cat([at_end * share, at_end]),)
        cotangents += tuple(torch.zeros_like(cotangents[0]) for _ in self.optimizer.names)
        for step, state in self._states(steps):
            batches, settings = self.trajectory.step(step, self.device)
            self._load(state[0])
            gradient, products = self._products(batches)
            before, of_gradient = self.optimizer.adjoint(state, gradient, settings, cotangents)
            hessian, gains = products(of_gradient)
            if not torch.isfinite(hessian).all():
                raise FloatingPointError(
                    f"the sweep is not finite at step {step}: the run was too unstable to be carried influence through; try a "
                    "smaller learning_rate, or observation='in_run'"
                )
            names = ("examples", "weight", "margin")
            examples, weight, margin = (torch.cat([getattr(b, name) for b in batches]) for name in names)
            counted = weight > 0
            examples, weight, gains, margin = examples[counted], weight[counted], gains[counted], margin[counted]
            if own:
                record(step, examples, weight, own_gains(gains[:, examples].T, weight), None, margin)
            else:
                of_end = gains[:, count:]
                if self.panel is not None:
                    if step in self.panel.looks:
                        reach = self.optimizer.reach(state, gradient, settings)
                        self.panel.look(step, *self._panel_gains(of_gradient[count:] * reach, batches))
                    self.panel.add(step, examples)
                _, _, variance = step_statistics(*(x.double().cpu().numpy() for x in (weight, of_end)))
                record(step, examples, weight, gains[:, :count], variance, margin)
            theta = before[0] + hessian
            if step == self.keep:
                self.kept = theta[-count:].clone()
            if step in looks:
                theta[:count] += self.targets.gradients(self.model, self.parameters) * share
            cotangents = (theta, *before[1:])

    def _states(self, steps: int) -> Iterator[tuple[int, State]]:
        """(t, s_t) from the last step down; what was not kept is computed again, a segment at a time."""
        start, segment = self.trajectory.start, self.trajectory.segment
        for first in range(start + (steps - 1 - start) // segment * segment, start - 1, -segment):
            states = [self.trajectory.state(first, self.device)]
            for step in range(first, min(first + segment, steps) - 1):
                batches, settings = self.trajectory.step(step, self.device)
                self._load(states[-1][0])
                states.append(self.optimizer.step(states[-1], self._gradient(batches), settings))
            for offset in reversed(range(len(states))):
                yield first + offset, states.pop()

    def _load(self, theta: Tensor) -> None:
        start = 0
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.copy_(theta[start : start + parameter.numel()].view_as(parameter))
                start += parameter.numel()

    def _loss(self, batch: MicroBatch, coefficient: Tensor) -> Tensor:
        """Σ_i q_i ℓ_i, with the random state that the run had."""
        self.model.train()
        set_random_states(batch.random, self.device)
        losses, _ = self.per_example(self.model, dict(batch.inputs))
        return (coefficient * losses).sum()

    def _gradient(self, batches: list[MicroBatch]) -> Tensor:
        total = None
        for batch in batches:
            parts = torch.autograd.grad(self._loss(batch, batch.coefficient), self.parameters, materialize_grads=True)
            flat = torch.cat([part.flatten() for part in parts])
            total = flat if total is None else total + flat
        return total

    def _products(self, batches: list[MicroBatch]) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """The gradient of a step, and the function λ^g `[vectors, parameters]` → H λ^g and the gains `[batch, vectors]`."""
        # With one micro-batch the graph of the gradient is kept for the second pass, else it is built again for each.
        graph = self._graph(batches[0]) if len(batches) == 1 else None
        gradient = torch.cat([g.detach().flatten() for g in graph[0]]) if graph else self._gradient(batches)
        total = sum(batch.coefficient.sum() for batch in batches)

        def products(of_gradient: Tensor) -> tuple[Tensor, Tensor]:
            hessian, gains = torch.zeros_like(of_gradient), []
            for batch in batches:
                parts, coefficient = graph or self._graph(batch)
                split = of_gradient.split([p.numel() for p in self.parameters], dim=1)
                vectors = [part.reshape(-1, *p.shape) for part, p in zip(split, self.parameters, strict=True)]
                *second, of_coefficient = batched_grad(
                    parts, [*self.parameters, coefficient], vectors, at_once=self.at_once
                )
                hessian += torch.cat([part.flatten(1) for part in second], dim=1)
                # Σ_i q_i is 1 where the step descended a mean, and then a_i is the gain of a batch of copies of i.
                gains.append(-(of_coefficient * total).T)
            return hessian, torch.cat(gains)

        return gradient, products

    def _panel_gains(self, of_gradient: Tensor, batches: list[MicroBatch]) -> tuple[Tensor, Tensor]:
        """Weights `[m]` of the panel's examples, and the gains `[m, vectors]` that each would give as this step's batch."""
        total = sum(batch.coefficient.sum() for batch in batches)
        split = of_gradient.split([p.numel() for p in self.parameters], dim=1)
        vectors = [part.reshape(-1, *p.shape) for part, p in zip(split, self.parameters, strict=True)]
        weights, gains = [], []
        for rows in self.rows:
            self.model.train()
            losses, weight = self.per_example(self.model, dict(rows))
            coefficient = torch.ones_like(losses, requires_grad=True)
            parts = torch.autograd.grad(
                (coefficient * losses).sum(), self.parameters, create_graph=True, materialize_grads=True
            )
            gains.append(-(batched_grad(parts, [coefficient], vectors, at_once=self.at_once)[0] * total).T)
            weights.append(weight)
        return torch.cat(weights), torch.cat(gains)

    def _graph(self, batch: MicroBatch) -> tuple[tuple[Tensor, ...], Tensor]:
        coefficient = batch.coefficient.clone().requires_grad_()
        parts = torch.autograd.grad(
            self._loss(batch, coefficient), self.parameters, create_graph=True, materialize_grads=True
        )
        return parts, coefficient
