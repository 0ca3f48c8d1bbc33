"""Many small trainings at once, hundreds as one batch: what brute force is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap


Rows = Sequence[int] | np.ndarray | Tensor
ExampleLoss = Callable[[Tensor, Tensor], Tensor]

CHUNK_MODELS = 200  # beyond this, more models at once gain no speed on a CPU
CHUNK_ELEMENTS = 2**26  # parameters (or inputs) of all models of a chunk: 256 MiB in fp32


def cross_entropy_per_example(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits `[n, classes]` and labels `[n]`, one value per example."""
    return F.cross_entropy(outputs, labels, reduction="none")


def epoch_orders(rows: Tensor, seed: int) -> Iterator[Tensor]:
    """The rows in the order of epoch 0, 1, … of the model with this seed: reshuffled without replacement, no end."""
    generator = np.random.default_rng([1, seed])  # its own stream: not the numbers that initialise the model
    while True:
        yield rows[torch.from_numpy(generator.permutation(len(rows)))]


def train_ensemble(
    make_model: Callable[[int], nn.Module],
    inputs: Tensor,
    labels: Tensor,
    members: Sequence[Rows],
    seeds: Sequence[int],
    *,
    epochs: int | None = None,
    max_steps: int | None = None,
    batch_size: int,
    lr: float,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    momentum: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    schedule: Literal["constant", "linear"] = "constant",
    loss: ExampleLoss = cross_entropy_per_example,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """Train many small models at once, each on its own rows, from its own initialisation, in its own order.

    Every model ends where `torch.optim.SGD` or `torch.optim.AdamW` would have taken it alone, on the mean loss of the
    batches of [`epoch_orders`], up to floating point and whoever else is in the ensemble. Members may differ in size:
    the last, incomplete batch of an epoch is kept, so an epoch has ⌈rows / batch_size⌉ steps of the member's own.
    Where other processes keep the cores busy, `torch.set_num_threads(1)` is several times faster.

    Args:
        make_model (callable): `make_model(seed)` returns a model with `model(inputs) -> outputs`. Called under
            `torch.manual_seed(seed)` of the CPU; the caller's random state is left alone. Batched with
            `torch.func.vmap`, hence no dropout and no control flow on values.
        inputs (`Tensor`): `[n, …]`, on the device to train on.
        labels (`Tensor`): `[n, …]`.
        members (sequence of row indices): the rows of `inputs` that each model trains on.
        seeds (sequence of `int`): one non-negative seed per member, for initialisation and order.
        epochs (`int`, *optional*): passes of every member over its rows. Either this or `max_steps`.
        max_steps (`int`, *optional*): steps of every member instead, all on full batches that run on from one epoch into the
            next: members of different sizes are trained equally long and equally noisily, and differ in their data alone.
        batch_size (`int`): examples a step.
        lr (`float`): learning rate.
        optimizer (`"sgd"` | `"adamw"`): with decay added to the gradient, or decoupled.
        momentum (`float`): of SGD.
        betas (`tuple[float, float]`), eps (`float`): of AdamW.
        weight_decay (`float`): of either.
        schedule (`"constant"` | `"linear"`): `linear` falls from `lr` at a member's first step to 0 after its last.
        loss (callable): `loss(outputs, labels) -> [examples]`, one value per example.
        chunk (`int`, *optional*): models trained at once. By default 200, or fewer if they are large.

    Returns:
        `dict[str, Tensor]`: parameters and buffers by name, `[members, *shape]`.

    Raises:
        ValueError: no members, seeds that do not match them, a member without rows or with unknown ones, a model with
            BatchNorm or with buffers that a forward pass changes, or a setting that makes no sense.
    """
    if not members or len(members) != len(seeds):
        raise ValueError(f"members and seeds: {len(members)} and {len(seeds)}, must be as many, and at least 1")
    if (epochs is None) == (max_steps is None):
        raise ValueError(f"epochs={epochs}, max_steps={max_steps}: give one of them")
    if (max_steps if epochs is None else epochs) < 1 or batch_size < 1:
        raise ValueError(f"epochs={epochs}, max_steps={max_steps}, batch_size={batch_size}: must be at least 1")
    if optimizer not in ("sgd", "adamw"):
        raise ValueError(f"optimizer={optimizer!r}: must be 'sgd' or 'adamw'")
    if optimizer == "adamw" and momentum:
        raise ValueError(f"momentum={momentum}: belongs to 'sgd'; 'adamw' has betas")
    if schedule not in ("constant", "linear"):
        raise ValueError(f"schedule={schedule!r}: must be 'constant' or 'linear'")
    members = [_checked_rows(rows, len(inputs), f"members[{i}]").cpu() for i, rows in enumerate(members)]
    seeds = [int(seed) for seed in seeds]
    skeleton = _seeded_models(make_model, seeds[:1])[0].to(inputs.device)
    _check_examples_are_independent(skeleton, inputs[:2])
    trainable = [name for name, p in skeleton.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("make_model: nothing is trainable")
    chunk = chunk or _chunk_size(sum(p.numel() for p in skeleton.parameters()))

    # Longest first, so that the members of a chunk are about as long and those still training are always a prefix.
    by_length = sorted(range(len(members)), key=lambda i: len(members[i]), reverse=True)
    chunks = []
    for start in range(0, len(members), chunk):
        picked = by_length[start : start + chunk]
        state = _stacked_state(_seeded_models(make_model, [seeds[i] for i in picked]), inputs.device)
        parameters = {name: state[name] for name in trainable}
        if optimizer == "sgd":
            update_ = _SGD(parameters, momentum, weight_decay)
        else:
            update_ = _AdamW(parameters, betas, eps, weight_decay)
        lengths = torch.tensor([len(members[i]) for i in picked])
        orders = [epoch_orders(members[i], seeds[i]) for i in picked]
        if max_steps is not None:  # one long epoch
            lengths = torch.full_like(lengths, max_steps * batch_size)
            orders = [iter([_first(order, max_steps * batch_size)]) for order in orders]
        steps = (lengths + batch_size - 1) // batch_size
        batches = _padded_batches(lengths, batch_size, parameters[trainable[0]])
        for epoch in range(epochs or 1):
            # A member that is shorter than its chunk repeats a row of its own, with weight 0.
            order = nn.utils.rnn.pad_sequence([next(o) for o in orders], batch_first=True, padding_value=-1)
            order = torch.where(order < 0, order[:, :1], order).to(inputs.device)
            for index, (columns, weights) in enumerate(batches):
                active = len(weights)
                rows = order[:active, columns]
                views = {name: value[:active].detach() for name, value in state.items()}
                leaves = [views[name].requires_grad_() for name in trainable]
                values = _batched_losses(skeleton, views, inputs[rows], labels[rows], loss)
                # A model's loss depends on its own parameters alone: the gradient of the sum is every model's own.
                gradients = torch.autograd.grad((weights * values).sum(), leaves)
                done = (epoch * steps + index)[:active]
                rate = lr * (1 - done.double() / ((epochs or 1) * steps[:active])) if schedule == "linear" else lr
                with torch.no_grad():
                    update_(gradients, done + 1, torch.as_tensor(rate, dtype=torch.float64).expand(active))
        chunks.append(state)
    back = torch.tensor(by_length, device=inputs.device).argsort()
    return {name: torch.cat([state[name] for state in chunks])[back] for name in chunks[0]}


@torch.no_grad()
def ensemble_losses(
    make_model: Callable[[int], nn.Module],
    state: dict[str, Tensor],
    inputs: Tensor,
    labels: Tensor,
    targets: Tensor | Sequence[Rows],
    *,
    loss: ExampleLoss = cross_entropy_per_example,
    chunk: int | None = None,
) -> Tensor:
    """Mean loss of every model of an ensemble on every target, in eval mode.

    Args:
        make_model (callable): as in [`train_ensemble`].
        state (`dict[str, Tensor]`): what [`train_ensemble`] returned.
        inputs (`Tensor`): `[n, …]`.
        labels (`Tensor`): `[n, …]`.
        targets (`Tensor` or sequence of row indices): the target of each example, `[n]` with values 0 … C−1 (negative:
            none), or the rows of each target.
        loss (callable): `loss(outputs, labels) -> [examples]`.
        chunk (`int`, *optional*): models evaluated at once.

    Returns:
        `Tensor`: `[models, C]`.

    Raises:
        ValueError: a target without examples or with unknown ones.
    """
    if isinstance(targets, Tensor):
        if targets.shape != (len(inputs),) or targets.is_floating_point() or targets.dtype == torch.bool:
            raise ValueError(f"targets: {targets.dtype} {list(targets.shape)}, must be integers [{len(inputs)}]")
        targets = [(targets == c).nonzero().flatten() for c in range(int(targets.max()) + 1)]
    targets = [_checked_rows(t, len(inputs), f"targets[{c}]").to(inputs.device) for c, t in enumerate(targets)]
    if not targets:
        raise ValueError("targets: none, so there is no loss to take")
    skeleton = _seeded_models(make_model, [0])[0].to(inputs.device).eval()
    models = len(next(iter(state.values())))
    chunk = chunk or _chunk_size(max(inputs.numel(), sum(v.numel() for v in state.values()) // models))
    means = []
    for start in range(0, models, chunk):
        piece = {name: value[start : start + chunk] for name, value in state.items()}
        count = min(chunk, models - start)
        values = _batched_losses(
            skeleton, piece, inputs.expand(count, *inputs.shape), labels.expand(count, *labels.shape), loss
        )
        means.append(torch.stack([values[:, rows].mean(1) for rows in targets], dim=1))
    return torch.cat(means)


class _SGD:
    """`torch.optim.SGD` on the first `len(step)` models of stacked parameters."""

    def __init__(self, parameters: dict[str, Tensor], momentum: float, weight_decay: float) -> None:
        self.parameters, self.momentum, self.weight_decay = list(parameters.values()), momentum, weight_decay
        self.velocities = [torch.zeros_like(p) if momentum else None for p in self.parameters]

    def __call__(self, gradients: Sequence[Tensor], step: Tensor, lr: Tensor) -> None:
        for p, v, g in zip(self.parameters, self.velocities, gradients, strict=True):
            p = p[: len(step)]
            if self.weight_decay:
                g = g.add(p, alpha=self.weight_decay)
            if v is not None:
                g = v[: len(step)].mul_(self.momentum).add_(g)
            p.addcmul_(g, _per_model(-lr, p))


class _AdamW:
    """`torch.optim.AdamW` on the first `len(step)` models of stacked parameters; `step` counts from 1."""

    def __init__(
        self, parameters: dict[str, Tensor], betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.parameters, self.betas, self.eps, self.weight_decay = list(parameters.values()), betas, eps, weight_decay
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    def __call__(self, gradients: Sequence[Tensor], step: Tensor, lr: Tensor) -> None:
        (beta1, beta2), step = self.betas, step.double()
        for p, (m, v), g in zip(self.parameters, self.moments, gradients, strict=True):
            p, m, v = p[: len(step)], m[: len(step)], v[: len(step)]
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            denominator = (v / _per_model(1 - beta2**step, p)).sqrt_().add_(self.eps)
            if self.weight_decay:
                p.mul_(_per_model(1 - lr * self.weight_decay, p))
            p.addcmul_(m / denominator, _per_model(-lr / (1 - beta1**step), p))


def _per_model(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(-1, *[1] * (like.dim() - 1))


def _first(epochs: Iterator[Tensor], count: int) -> Tensor:
    """The first `count` rows of one epoch after the other."""
    parts = [next(epochs)]
    parts += [next(epochs) for _ in range(count // len(parts[0]))]
    return torch.cat(parts)[:count]


def _padded_batches(lengths: Tensor, batch_size: int, like: Tensor) -> list[tuple[slice, Tensor]]:
    """The steps of an epoch: columns of the shuffled rows, and weights `[members with such a batch, columns]`.

    `lengths` descend. Weights are 1/(the member's batch size) on its own examples and 0 beyond.
    """
    batches = []
    for start in range(0, int(lengths[0]), batch_size):
        sizes = (lengths[lengths > start] - start).clamp(max=batch_size)
        weights = (torch.arange(int(sizes[0])) < sizes[:, None]) / sizes[:, None].double()
        batches.append((slice(start, start + int(sizes[0])), weights.to(like)))
    return batches


def _batched_losses(
    skeleton: nn.Module, state: dict[str, Tensor], inputs: Tensor, labels: Tensor, loss: ExampleLoss
) -> Tensor:
    """Losses `[models, examples]` of stacked models on inputs and labels `[models, examples, …]`."""
    outputs = vmap(lambda values, x: functional_call(skeleton, values, (x,)))(state, inputs)
    values = loss(outputs.flatten(0, 1), labels.flatten(0, 1))
    if values.shape != (labels.shape[0] * labels.shape[1],):
        raise ValueError(f"loss: returned {list(values.shape)}, must be one value per example (reduction='none')")
    return values.view(labels.shape[:2])


def _seeded_models(make_model: Callable[[int], nn.Module], seeds: Sequence[int]) -> list[nn.Module]:
    models = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.default_generator.manual_seed(seed)  # unlike torch.manual_seed, leaves every GPU's state alone
            models.append(make_model(seed))
    return models


def _stacked_state(models: list[nn.Module], device: torch.device) -> dict[str, Tensor]:
    states = [dict(model.named_parameters()) | dict(model.named_buffers()) for model in models]
    return {name: torch.stack([state[name].detach() for state in states]).to(device) for name in states[0]}


@torch.no_grad()
def _check_examples_are_independent(model: nn.Module, inputs: Tensor) -> None:
    # A batch is padded, and a stacked buffer cannot be updated: both ask that a forward pass is a function of the row.
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        model(inputs)
    changed = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]
    if changed:
        raise ValueError(f"make_model: a forward pass changes the buffers {', '.join(changed)}; use e.g. GroupNorm")
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise ValueError("make_model: BatchNorm mixes the examples of a batch; use e.g. GroupNorm")


def _checked_rows(rows: Rows, n: int, name: str) -> Tensor:
    rows = torch.as_tensor(rows)
    if rows.dim() != 1 or not len(rows):
        raise ValueError(f"{name}: shape {list(rows.shape)}, must be a list of at least one row index")
    if rows.is_floating_point() or rows.dtype == torch.bool:
        raise ValueError(f"{name}: {rows.dtype}, must be integers (row indices, not a mask)")
    low, high = (int(bound) for bound in rows.aminmax())
    if low < 0 or high >= n:
        raise ValueError(f"{name}: rows {low} to {high}, but there are rows 0 to {n - 1}")
    return rows.long()


def _chunk_size(elements_per_model: int) -> int:
    return max(1, min(CHUNK_MODELS, CHUNK_ELEMENTS // max(1, elements_per_model)))
