"""The diagonal of the Fisher information: how sharply each parameter decides what the model says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap

from ..modes import in_eval_mode
from .reference import trainable_parameters


Forward = Callable[..., Any]
Predictions = Callable[[Forward, Mapping[str, Tensor]], tuple[Tensor, Tensor]]

CHUNK_ELEMENTS = 2**26  # per-example gradients held at once: 256 MiB in fp32


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    predictions: Predictions,
    *,
    method: Literal["exact", "monte_carlo"] = "exact",
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    r"""Diagonal of the true Fisher information at the present parameters; labels are not used:

    $$ F_i = \frac1N \sum_x \sum_c p_c(x)\,\big(\partial_i \log p_c(x)\big)^2 $$

    (PBU, arXiv 2403.16246.) `"monte_carlo"` replaces the sum over classes by `samples` labels drawn from the model: an
    unbiased estimate whose cost does not grow with the number of classes, and the only way for a vocabulary. An
    example that makes several predictions (tokens) counts with the log-likelihood of them all.

    The model runs in eval mode, one example at a time as far as the mathematics goes (BatchNorm uses its running
    statistics).

    Args:
        model (`nn.Module`): differentiated with respect to its trainable parameters. Left as it was.
        batches (iterable of mappings): model inputs, each value batched along its first axis.
        predictions (callable): `predictions(forward, batch) -> (logits, targets)` with logits `[batch, …, classes]` and
            targets `[batch, …]`; targets of −100 mark predictions that do not count.
        method (`"exact"` | `"monte_carlo"`): exact needs one backward pass per class and one prediction per example.
        samples (`int`): labels drawn per prediction, with `"monte_carlo"`.
        generator (`torch.Generator`, *optional*): source of those labels, on the model's device.

    Returns:
        `dict[str, Tensor]`: by parameter name, in the parameter's shape, fp32.

    Raises:
        ValueError: no examples, nothing trainable, or `"exact"` asked of a model with several predictions an example.
    """
    parameters = {name: p.detach() for name, p in trainable_parameters(model).items()}
    if method not in ("exact", "monte_carlo"):
        raise ValueError(f"method={method!r}: must be 'exact' or 'monte_carlo'")
    if not parameters:
        raise ValueError("model: nothing is trainable, so there is no Fisher information to compute")
    totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    count = 0
    with in_eval_mode(model):
        for batch in batches:
            inputs = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
            with torch.no_grad():
                logits, targets = predictions(model, inputs)
            cotangents = label_cotangents(logits.float(), targets, method, samples, generator)
            _add_squared_gradients_(totals, model, parameters, inputs, cotangents.to(logits.dtype), predictions)
            count += len(logits)
    if count == 0:
        raise ValueError("batches: no examples to compute the Fisher information on")
    torch._foreach_div_(list(totals.values()), count * (samples if method == "monte_carlo" else 1))
    return totals


def label_cotangents(
    logits: Tensor, targets: Tensor, method: str, samples: int, generator: torch.Generator | None
) -> Tensor:
    """`[batch, draws, …, classes]`: pulled back through the logits and squared, their sum over draws is F times `draws`.

    ∂ log p_c / ∂ logits = e_c − p, so √p_c (e_c − p) for every class is exact, and e_c − p for drawn classes unbiased.
    """
    p = logits.softmax(-1)
    if method == "exact":
        if logits.dim() != 2:
            raise ValueError("fisher='exact' needs one prediction per example; use fisher='monte_carlo' for sequences")
        one_hot = torch.eye(p.shape[-1], device=p.device, dtype=p.dtype)
        return p.sqrt().unsqueeze(-1) * (one_hot - p.unsqueeze(1)) * (targets != -100).view(-1, 1, 1)
    drawn = torch.multinomial(p.flatten(0, -2), samples, replacement=True, generator=generator)
    one_hot = nn.functional.one_hot(drawn.T.reshape(samples, *p.shape[:-1]), p.shape[-1]).to(p.dtype)
    return ((one_hot - p) * (targets != -100).unsqueeze(-1)).transpose(0, 1)


def _add_squared_gradients_(totals, model, parameters, inputs, cotangents, predictions) -> None:
    # A loop over examples, not vmap: transformers asks masks and ids in Python (attention_mask.all()), which vmap refuses.
    chunk = max(1, CHUNK_ELEMENTS // sum(p.numel() for p in parameters.values()))
    for row, directions in enumerate(cotangents):
        example = {name: value[row : row + 1] for name, value in inputs.items()}

        def example_logits(values: dict[str, Tensor], example=example) -> Tensor:
            logits, _ = predictions(lambda *args, **kwargs: functional_call(model, values, args, kwargs), example)
            return logits.squeeze(0)

        _, pull_back = vjp(example_logits, parameters)
        for piece in directions.split(chunk):
            (gradients,) = vmap(pull_back)(piece)
            for name, gradient in gradients.items():
                totals[name] += gradient.float().square().sum(0)


def gaussian_fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    answer: Callable[[Mapping[str, Tensor]], Tensor],
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    r"""Diagonal of the Fisher information of a model whose answer is the mean of a Gaussian of unit variance, as a denoiser's:
    $F_i = E\big[\sum_k (\partial \epsilon_k / \partial \theta_i)^2\big]$, estimated without bias.

    The answer is multiplied by random signs ξ. Since $E[\xi_k \xi_l] = 0$ for different pixels and for different examples,
    the squared gradient of Σ ξₖ εₖ over a batch is the sum that is wanted, so that one backward pass does for a whole batch.

    Args:
        model (`nn.Module`): its trainable parameters count.
        batches: what `answer` takes.
        answer (callable): the model's answers to a batch, `[batch, …]`.
        generator (`torch.Generator`): draws ξ; on the device of the answers.

    Returns:
        `dict[str, Tensor]`: by parameter, fp32: a mean over examples, a sum over pixels.
    """
    parameters = trainable_parameters(model)
    totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    count = 0
    for batch in batches:
        out = answer(batch)
        signs = torch.randint(0, 2, out.shape, generator=generator, device=out.device, dtype=out.dtype) * 2 - 1
        gradients = torch.autograd.grad((out * signs).sum(), list(parameters.values()), allow_unused=True)
        for total, gradient in zip(totals.values(), gradients, strict=True):
            if gradient is not None:
                total.add_(gradient.float().square())
        count += len(out)
    return {name: total / count for name, total in totals.items()}


@torch.no_grad()  # grad() below has a graph of its own; none is kept for what the score holds
def scalar_fisher(
    model: nn.Module, inputs: Tensor, score: Callable[[Any], Tensor], *, batch_size: int = 32
) -> dict[str, Tensor]:
    r"""How sharply each parameter decides a score of what the model makes: $F_i = E_z\big[(\partial s(G_\theta(z)) / \partial \theta_i)^2\big]$.

    Adapt-then-Unlearn (arXiv 2309.14054) takes a discriminator's logit for s.

    The model runs in eval mode, one example at a time as far as the mathematics goes.

    Args:
        model (`nn.Module`): its trainable parameters count. Left as it was.
        inputs (`Tensor`): z, `[n, …]`.
        score (callable): the model's answer to a batch of one, to a scalar; differentiable, by `torch.func` too.
        batch_size (`int`): per-example gradients at a time, at most.

    Returns:
        `dict[str, Tensor]`: by parameter, fp32: a mean over examples.

    Raises:
        ValueError: no examples, or nothing trainable.
    """
    parameters = {name: p.detach() for name, p in trainable_parameters(model).items()}
    if not parameters or not len(inputs):
        raise ValueError(
            "inputs, model: no examples or nothing trainable, so there is no Fisher information to compute"
        )
    totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    chunk = max(1, min(batch_size, CHUNK_ELEMENTS // sum(p.numel() for p in parameters.values())))

    def example_score(values: dict[str, Tensor], z: Tensor) -> Tensor:
        return score(functional_call(model, values, (z.unsqueeze(0),))).squeeze()

    with in_eval_mode(model):
        for part in inputs.split(chunk):
            for name, gradient in vmap(grad(example_score), (None, 0))(parameters, part).items():
                totals[name] += gradient.float().square().sum(0)
    return {name: total / len(inputs) for name, total in totals.items()}


def scaled_to_mean_one(fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diagonal divided by its mean over all parameters, so that a weight means the same for every model."""
    fisher = dict(sorted(fisher.items()))  # sums are rounded, and a file gives them in another order
    mean = sum(value.sum() for value in fisher.values()) / sum(value.numel() for value in fisher.values())
    return {name: value / mean for name, value in fisher.items()}
