"""Which tokens of an example taught a language model a behaviour."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..modes import in_eval_mode
from ..training.checks import check_number
from ..training.losses import IGNORED
from .attribution import DAMPING, Attribution, Model, finished_trainer, model_and_checkpoints
from .config import FINEArguments
from .finished.curvature import damped
from .finished.looks import Looks
from .report.report import InfluenceReport
from .report.tokens import token_table


def attribute_tokens(
    report: InfluenceReport,
    model: Model | Sequence[str | Path],
    train_dataset: Any,
    target_dataset: Any,
    sample_ids: Sequence[Any] | None = None,
    *,
    k: int = 10,
    args: FINEArguments | None = None,
    processing_class: Any = None,
    data_collator: Callable | None = None,
    damping: float = DAMPING,
    curvature_examples: int = 256,
) -> InfluenceReport:
    r"""The report, and of the examples that stand out which of their tokens taught the target: see `report.tokens` and `report.to_html`.

    The influence of an example that a finished model has ([`attribute`]) is a sum over the tokens that it predicts,

    $$ a_{i,c} = \sum_t a_{i,t,c}, \qquad a_{i,t,c} = \frac{1}{T_i}\, v_c^\top \nabla \ell_{i,t}(\hat\theta), \qquad
       v_c = (F + \delta)^{-1} \nabla \ell_c(\hat\theta), $$

    ℓ of token t given those before it, and all T of an example from one backward pass of a backward pass: vᵀ∇ℓ_t is the derivative of
    Σ u_t vᵀ∇ℓ_t by u_t. Influence by token is that of [Grosse et al. 2023](https://arxiv.org/abs/2308.03296).

    It is that of the model as it is. Of a training that was observed μ adds up what its steps did, so the two orders of *examples* differ somewhat.

    Args:
        report ([`InfluenceReport`]): of the same training data and targets, of any run.
        model, train_dataset, target_dataset, processing_class, data_collator, args, damping, curvature_examples: as for [`attribute`]; of
            checkpoints the last counts.
        sample_ids (*optional*): of which examples. Default: of each target the `k` with the largest μ and the `k` with the smallest.
        k (`int`, defaults to 10): see above.

    Returns:
        [`InfluenceReport`]: the same one with tokens, which [`~InfluenceReport.save_to_disk`] keeps too. Tokens that it had are replaced.

    Raises:
        ValueError: the model is no causal language model; the report is of each example on itself, of other targets, or has ids that are not
            in `train_dataset`; the model's attention cannot be differentiated twice.
    """
    for name, value in (("k", k), ("curvature_examples", curvature_examples)):
        check_number(name, value, "≥ 1")
    check_number("damping", damping, "> 0")
    if report.targets == ("self",):
        raise ValueError(
            "report: is of every example on itself, where all of its tokens teach; pass one of target rows"
        )
    model, found = model_and_checkpoints(model, None)
    with finished_trainer(
        model, train_dataset, target_dataset, args=args, processing_class=processing_class, data_collator=data_collator
    ) as (trainer, looks):  # fmt: skip
        if not (trainer.is_causal_lm and trainer.has_classes):
            raise ValueError(
                f"model: {type(trainer.model).__name__} predicts no tokens; only causal language models with their own loss have tokens that teach"
            )
        names = list(trainer.target_sets)
        if set(names) != set(report.targets):
            raise ValueError(
                f"target_dataset: has targets {', '.join(names)}, the report has {', '.join(report.targets)}; pass the rows that it was made with"
            )
        place = {sample_id: position for position, sample_id in enumerate(trainer.sample_ids)}
        wanted = {name: list(_ends(report, name, k) if sample_ids is None else sample_ids) for name in names}
        for sample_id in (one for ids in wanted.values() for one in ids):
            if sample_id not in place:
                raise ValueError(f"sample_ids: {sample_id!r} is not in train_dataset; is the report of other rows?")
        if found:
            trainer._load_from_checkpoint(str(found[-1].folder), trainer.model)
        chosen = sorted({place[one] for ids in wanted.values() for one in ids})
        vectors = _directions(Attribution(trainer, looks, damping, curvature_examples))
        read = {
            trainer.sample_ids[position]: (
                _pieces(ids, trainer.processing_class),
                dict(zip(names, scores, strict=True)),
            )
            for position, ids, scores in _scores(looks, vectors, chosen)
        }
    rows = [(one, name, read[one][0], read[one][1][name]) for name in report.targets for one in wanted[name]]
    return report.with_tokens(token_table(rows))


def _ends(report: InfluenceReport, target: str, k: int) -> list[Any]:
    """The k most helpful and the k most harmful, none twice."""
    both = [*report.top(k, target)["sample_id"], *report.top(k, target, harmful=True)["sample_id"]]
    return list(dict.fromkeys(both))


def _directions(sweep: Attribution) -> Mapping[str, Tensor]:
    """(F + δ)⁻¹∇ℓ_c by parameter, `[C, *shape]`."""
    trainer, looks, gradients = sweep.trainer, sweep.looks, sweep.target_gradients()
    total = 2 * looks.batches_of(len(sweep.chosen))
    with tqdm(total=total, desc="Tokens", unit="batch", disable=trainer.args.disable_tqdm) as bar, looks.quiet():
        curvature = looks.curvature(sweep.chosen, seed=trainer.args.seed, bar=bar)
    return curvature.apply(looks.split(gradients), damped(sweep.damping))


def _scores(
    looks: Looks, vectors: Mapping[str, Tensor], chosen: Sequence[int]
) -> Iterator[tuple[int, list[int], Tensor]]:
    """Position, token ids `[length]` and scores `[C, length]` of each example; NaN where nothing is predicted, as at the first token."""
    trainer, model = looks.trainer, looks.model
    parameters = [looks.ghost.covered[name] for name in vectors]
    for positions, inputs, _ in looks._batches(chosen):
        with in_eval_mode(model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            logits, labels = trainer.predictions(model, dict(inputs))
            losses = F.cross_entropy(
                logits.float().flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORED
            ).view(labels.shape)
            scores = _directional(losses, parameters, [*vectors.values()])
        counted = labels != IGNORED
        scores = (scores / counted.sum(1).clamp(min=1)[:, None]).masked_fill(~counted, torch.nan)
        scores = F.pad(scores, (1, 0), value=torch.nan)  # nothing tells what the first token is
        shown = inputs.get("attention_mask")
        shown = torch.ones_like(inputs["input_ids"]).bool() if shown is None else shown.bool()
        for row, position in enumerate(positions):
            yield (
                int(position),
                inputs["input_ids"][row][shown[row]].tolist(),
                scores[:, row, shown[row]].double().cpu(),
            )
    model.zero_grad()


def _directional(losses: Tensor, parameters: Sequence[nn.Parameter], vectors: Sequence[Tensor]) -> Tensor:
    """vᵀ∇ of each of `losses` along each direction: `[C, *losses.shape]`.

    Raises:
        ValueError: the model cannot be differentiated twice.
    """
    weights = torch.zeros_like(losses, requires_grad=True)
    gradients = torch.autograd.grad(
        losses, parameters, weights, create_graph=True, allow_unused=True, materialize_grads=True
    )
    found = []
    for c in range(len(vectors[0])):
        along = [vector[c].to(gradient) for vector, gradient in zip(vectors, gradients, strict=True)]
        try:
            found += torch.autograd.grad(gradients, weights, along, retain_graph=True)
        except RuntimeError as error:
            if "derivative" not in str(error):
                raise
            raise ValueError(
                "model: its attention cannot be differentiated twice, which tokens need; load it with attn_implementation='eager'"
            ) from error
    return torch.stack(found).detach()


def _pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token, so that together they are the text; of bytes that are no character by themselves the last has it."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return [str(one) for one in ids]
    pieces, whole = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        begun = text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids)
        pieces.append("" if begun else text[len(whole) :])
        whole = whole if begun else text
    return pieces
