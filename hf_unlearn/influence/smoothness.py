"""Whether a training is smooth in its data, told beforehand: three trainings, the weights of some rows moved by the same step twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from ..training.checks import check_number
from ..training.collators import ROW
from .trainer import FINEMixin


logger = logging.get_logger(__name__)

ENOUGH = 0.6  # between bad runs and good ones of benchmarks/influence_smoothness.py


def smoothness(
    trainer: FINEMixin, *, steps: int | None = None, share: float = 0.5, h: float = -0.5, seed: int = 0
) -> float:
    r"""How far the effect of one change of the data foretells that of the same change once more: metasmoothness.

    What unrolled gradients (`observation="propagated"`) say of a training is right where its outcome is smooth in the weights w of the rows. With v
    the rows of a random share, L the losses of all target examples after a training from the same start, in the same order, and Δ₁ = L(w + hv) − L(w),
    Δ₂ = L(w + 2hv) − L(w + hv),

    $$ S = \frac{\sum_j |\Delta_{1,j}| \operatorname{sign}(\Delta_{1,j} \Delta_{2,j})}{\sum_j |\Delta_{1,j}|} $$

    ([Engstrom et al. 2025](https://arxiv.org/abs/2503.13751)). 1: they agree in every sign; 0: one tells nothing of the other.

    Args:
        trainer ([`InfluenceTrainer`] or its like): that has not trained. Model, optimizer and random state are left as they are.
        steps (`int`, *optional*): optimizer steps of each training, the first ones of the run. Default: all of them.
        share (`float`, defaults to 0.5): of the rows, drawn at random, whose weights are moved.
        h (`float`, defaults to -0.5): by how much, twice. At -0.5 the third training is without these rows.
        seed (`int`, defaults to 0): of the rows that are drawn.

    Returns:
        `float`: S, from −1 to 1.

    Raises:
        ValueError: a value out of its range, `target="self"`, several processes, or a trainer that has trained.
        FloatingPointError: a gradient is not finite.
    """
    losses, _ = trained_along(trainer, steps=steps, share=share, h=h, seed=seed)
    value = agreement(*losses.diff(dim=0))
    if value < ENOUGH:
        logger.warning(
            "Influence: smoothness %.2f, below %.1f: μ of `propagated` would hardly rank examples as retraining does; try a smaller learning_rate.",
            value,
            ENOUGH,
        )
    return value


def agreement(first: Tensor, second: Tensor) -> float:
    """S of two differences of the same shape; 1 where nothing moved."""
    size = first.abs()
    total = size.sum()
    return float((size * first.sign() * second.sign()).sum() / total) if total > 0 else 1.0


def trained_along(
    trainer: FINEMixin, *, steps: int | None, share: float, h: float, seed: int
) -> tuple[Tensor, Tensor]:
    """After trainings with weights 1, 1 + h and 1 + 2h: losses of the target examples `[3, examples]` and parameters `[3, parameters]`, float64."""
    if trainer.target == "self":
        raise ValueError("trainer: with target='self' there is no target whose losses could be compared")
    if trainer.args.world_size > 1 or trainer.is_fsdp_enabled:
        raise ValueError("trainer: runs in several processes; look at it in one")
    if trainer.state.global_step:
        raise ValueError("trainer: has trained; make a new one, which begins where that began")
    check_number("share", share, "in (0, 1]")
    check_number("steps", steps, "≥ 1")
    if not h or 1 + 2 * h < 0:
        raise ValueError(f"h: {h}, must be other than 0 and at least -0.5, or weights would fall below 0")
    examples = len(trainer.sample_ids)
    moved = np.random.default_rng([seed, 5]).permutation(examples)[: max(1, round(share * examples))]
    losses, parameters = [], []
    with _as_it_was(trainer):
        torch.manual_seed(trainer.args.seed)
        loader = trainer.get_train_dataloader()
        whole = _steps_of(trainer, len(loader))
        batches = _batches(trainer, loader, min(steps or whole, whole))
        start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        for times in range(3):
            weights = torch.ones(examples, device=trainer.args.device)
            weights[torch.from_numpy(moved).to(weights.device)] += times * h
            trainer.model.load_state_dict(start)
            _train(trainer, batches, weights, whole)
            losses.append(trainer._targets().losses_of_examples(trainer.model))
            parameters.append(torch.cat([p.detach().double().flatten() for p in trainer._parameters.values()]))
    return torch.stack(losses), torch.stack(parameters)


def _steps_of(trainer: FINEMixin, batches: int) -> int:
    """Optimizer steps of the run, whose epochs have so many batches."""
    args = trainer.args
    each = -(-batches // args.gradient_accumulation_steps)
    return args.max_steps if args.max_steps > 0 else int(np.ceil(args.num_train_epochs * each))


def _batches(trainer: FINEMixin, loader: Iterable[dict], steps: int) -> list[list[dict]]:
    """The micro-batches of each step: the same for all trainings."""
    found = [[]]
    while True:
        for batch in loader:
            found[-1].append(dict(batch))
            if len(found[-1]) == trainer.args.gradient_accumulation_steps:
                found.append([])
            if len(found) > steps:
                return found[:steps]
        if found[-1]:  # an epoch's last step may be smaller
            found.append([])


def _train(trainer: FINEMixin, batches: list[list[dict]], weights: Tensor, whole: int) -> None:
    """Each step descends Σ w_i ℓ_i over the number of predictions."""
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.create_optimizer()
    trainer.create_scheduler(num_training_steps=whole, optimizer=trainer.optimizer)
    parameters, limit = list(trainer._parameters.values()), trainer.args.max_grad_norm
    torch.manual_seed(trainer.args.seed)
    for step, micro in enumerate(batches):
        trainer.model.train()
        trainer.model.zero_grad()
        prepared = [trainer._prepare_inputs({k: value for k, value in batch.items() if k != ROW}) for batch in micro]
        items = [trainer._weights(inputs).sum() for inputs in prepared]
        for batch, inputs, own in zip(micro, prepared, items, strict=True):
            with trainer.compute_loss_context_manager():
                losses, predictions = trainer.per_example_loss(trainer.model, inputs)
            # A language model's loss is a mean over the whole step's tokens, another's over each micro-batch.
            total = sum(items) if trainer.model_accepts_loss_kwargs else len(micro) * own
            weight = weights[batch[ROW].to(weights.device)] * predictions
            ((weight * losses).sum() / total).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit or torch.inf)
        if not norm.isfinite():
            raise FloatingPointError(f"gradient is not finite at step {step + 1}; try a smaller learning_rate")
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    trainer.model.zero_grad()


@contextmanager
def _as_it_was(trainer: FINEMixin) -> Iterator[None]:
    """Afterwards weights, modes, optimizer and random state are those of before."""
    model, before = trainer.model, (trainer.optimizer, trainer.lr_scheduler)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    training = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        model.load_state_dict(start)
        model.zero_grad()
        for module, was in training.items():
            module.training = was
        trainer.optimizer, trainer.lr_scheduler = before
