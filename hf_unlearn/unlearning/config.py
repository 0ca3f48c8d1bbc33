"""Settings of every unlearning trainer. A recipe's keys are these fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers import TrainingArguments
from trl import SFTConfig

from ..training.checks import REFUSED, check_fields, check_hub_strategy, check_stock
from ..training.config import GUARD_RANGES, GuardArguments, settle


RANGES = {
    "> 0": ("forget_weight", "preference_beta", "rmu_coefficient", "pdu_rate"),
    "≥ 0": (
        "retain_weight",
        "replay_weight",
        "isotropic_weight",
        "fisher_weight",
        "utility_tolerance",
        "heldout_loss",
        "rmu_layer",
    ),
    "≥ 1": ("retain_per_forget", "fisher_samples", "fisher_examples", "guard_patience"),
    "in [0, 1)": ("forget_accuracy",),
}


@dataclass
class UnlearnArguments(GuardArguments):
    """What unlearning adds to [`~transformers.TrainingArguments`]. The loss of a step is

    `forget_weight · forget + retain_weight · retain + replay_weight · replay + anchor`.

    > What to forget
        forget (`"class"` | `"examples"`, defaults to `"class"`): delete every trace of the labels in the forget set, or
            only of these examples. The right answers differ: a model that never saw an example may still classify it.
        forget_loss (`str`, defaults to `"bounded"`): `"ascent"`, `"npo"`, `"redirect"`, `"sever"`, `"uniform"`, `"match"`, or
            for texts `"simnpo"`, `"undial"`, `"wga"`, `"satimp"` or `"ceu"` with their papers' settings; `"dpo"`, which prefers what a
            column `alternate` of the forget rows answers instead; `"idkdpo"` and `"altpo"`, where without such a column "I don't
            know" is preferred, or answers with other facts that the original writes; `"rmu"`, which sends hidden states to a random
            vector; `"pdu"`, which flattens logits under a limit on the loss of `retain_dataset=`; or `"bounded"`, which chooses:
            `"match"` to forget examples from a classifier, which needs the loss of held-out data, `"sever"` to forget a class, where the head is
            a linear layer that is trained, else `"redirect"`, as for texts.
        forget_weight (`float`, defaults to 1.0): weight of the forget loss, > 0.
        preference_beta (`float`, defaults to 0.1): inverse temperature β of `npo`, `dpo`, `idkdpo` and `altpo`.
        loss_reduction (`"example"` | `"token"` | `"sum"`, defaults to `"example"`): of texts: a mean over the tokens of each that
            count and then over texts; or over all tokens of a batch, in the forget and the retain loss, as open-unlearning
            does (of each micro-batch of each process); or the forget loss summed over the tokens of a text, as in NPO's
            paper, which takes more of what is to be kept.
        rmu_layer (`int`, *optional*): the layer, counted from 0, whose output `rmu` changes, by training it and the two below it. Default:
            7/32 of the way up, as in the paper.
        rmu_coefficient (`float`, defaults to 6.5): length c of the vector that `rmu` sends hidden states to, in their unit.
        heldout_loss (`float`, *optional*): mean loss, in nats, of data the model has never seen: the target of
            `forget="examples"`. Computed from `heldout_dataset=` when that is given.

    > What to keep
        retain_weight (`float`, defaults to 1.0): weight of the loss on `retain_dataset=`, if there is one; with `pdu` only where it
            begins.
        retain_loss (`"nll"` | `"kl"`, defaults to `"nll"`): that loss: the task's own, or the divergence KL(original ‖ student) of
            the answers, which takes another forward pass. `rmu` has its own, and `redirect` in [`UnlearnSFTTrainer`] that divergence,
            without the pass.
        retain_per_forget (`int`, defaults to 1): rows to keep that stand beside each forget row of a batch; in
            [`UnlearnSFTConfig`] 2.
        pdu_rate (`float`, defaults to 1.0): by how much the weight rises in an optimiser step for each nat that the loss is above its
            limit, with `pdu`; the limit is the original's loss and `utility_tolerance`.
        replay_weight (`float`, *optional*): weight of the data-free replay. Default: 5 (`npo`: 1, `match`: 0.1), or 0 with a
            `retain_dataset=`.
        isotropic_weight (`float`, defaults to 0.1): γ of the anchor γ‖θ−θ*‖², a sum over parameters; under LoRA, over
            the change of the product BA. In [`UnlearnSFTConfig`] 0.
        fisher_weight (`float`, defaults to 0.0): β of the anchor β Σ Fᵢ(θᵢ−θ*ᵢ)². Not available under LoRA.
        fisher (`"exact"` | `"monte_carlo"`, defaults to `"exact"`): the Fisher information: a sum over all classes, or
            over labels drawn from the model (sequences, many classes).
        fisher_samples (`int`, defaults to 1): labels drawn per prediction, Monte-Carlo only.
        fisher_examples (`int`, *optional*, defaults to 256): forget examples used, drawn by the seed; None
            for all.
        bn (`"frozen"` | `"train"`, defaults to `"frozen"`): whether BatchNorm keeps its statistics or drifts toward
            those of the forget set.

    > When to stop
        guard (`bool`, defaults to `True`): watch forgetting and utility while training; see [`Guard`].
        guard_steps (`int`, *optional*): optimiser steps between two looks. Default: once per epoch.
        guard_examples (`int`, defaults to 512): forget examples, and others for utility, that it looks at, at most.
        guard_patience (`int`, defaults to 3): looks at a forgotten model without better utility before stopping.
        forget_accuracy (`float`, defaults to 0.01): with `forget="class"`: the accuracy on the forget set, in [0, 1], at
            or below which the class counts as forgotten.
        utility_tolerance (`float`, *optional*): how far utility may fall: accuracy on the `"retain"` evaluation set (in
            [0, 1], default 0.02), or for language models the rise of its loss in nats per token (default 0.1, a
            perplexity 1.1 times as high); where there is no such set, on `retain_dataset`; without either, divergence
            from the original on replay inputs, in nats (default 0.5).

    > Data and output
        id_column (`str`, defaults to `"id"`): column that identifies examples. Where forget and retain sets both have it they
            must not overlap; where one has not, or its ids are only row numbers, no row may be in both with the same label.
        merge_adapter (`bool`, defaults to `True`): save the model with the adapter merged into it. An adapter alone can be
            taken off again, which undoes the unlearning.
    """

    _argument_group_name = "unlearning"
    refused: ClassVar[dict[str, str]] = REFUSED | {  # stock fields, and why
        "label_smoothing_factor": "would be ignored while unlearning; override task_loss in a subclass"
    }
    anchors_on_parameters: ClassVar[tuple[str, ...]] = ("fisher_weight",)  # single ones, which a LoRA does not have

    forget: Literal["class", "examples"] = "class"
    forget_loss: Literal[
        "bounded", "ascent", "npo", "redirect", "sever", "uniform", "match", "simnpo", "undial", "wga", "satimp", "ceu", "dpo", "idkdpo",
        "altpo", "rmu", "pdu",
    ] = "bounded"  # fmt: skip
    forget_weight: float = 1.0
    preference_beta: float = 0.1
    loss_reduction: Literal["example", "token", "sum"] = "example"
    rmu_layer: int | None = None
    rmu_coefficient: float = 6.5
    heldout_loss: float | None = None
    retain_weight: float = 1.0
    retain_loss: Literal["nll", "kl"] = "nll"
    retain_per_forget: int = 1
    pdu_rate: float = 1.0
    replay_weight: float | None = None
    isotropic_weight: float = 0.1
    fisher_weight: float = 0.0
    fisher: Literal["exact", "monte_carlo"] = "exact"
    fisher_samples: int = 1
    fisher_examples: int | None = 256
    bn: Literal["frozen", "train"] = "frozen"
    guard_patience: int = 3
    forget_accuracy: float = 0.01
    utility_tolerance: float | None = None
    id_column: str = "id"
    merge_adapter: bool = True

    def __post_init__(self):
        check_stock(self, self.refused)
        settle(self)
        super().__post_init__()
        self._check_unlearn_arguments()

    def _check_unlearn_arguments(self) -> None:
        check_fields(self, RANGES)
        check_fields(self, GUARD_RANGES)
        check_hub_strategy(self)


@dataclass
class UnlearnConfig(UnlearnArguments, TrainingArguments):
    __doc__ = f"Configuration of [`UnlearnTrainer`]: [`~transformers.TrainingArguments`] and these.\n{UnlearnArguments.__doc__}"

    hub_strategy: str = "end"


@dataclass
class UnlearnSFTConfig(UnlearnArguments, SFTConfig):
    __doc__ = f"""Configuration of [`UnlearnSFTTrainer`]: [`~trl.SFTConfig`] and these.
{UnlearnArguments.__doc__}
    > Of language models
        own_samples (`int`, *optional*): of `redirect`: texts that the original writes, once, before the first step: what is to be kept. Default:
            4,000, and 1,000 beside a `retain_dataset=`, for what its rows leave out; 0 for none.
        learning_rate (`float`, *optional*): default: by the model's width, see [`~hf_unlearn.unlearning.language.trainer.default_rate`].
        num_train_epochs (`float`, *optional*): default: 3, and with `redirect` 12, or what makes 120 or 400
            steps of few or many rows.
        per_device_train_batch_size (`int`, defaults to 16): forget rows; with `retain_per_forget` rows to keep beside each of them.
        guard_steps (`int`, *optional*): default: once per epoch, and with `redirect` a tenth of the run.
    """

    hub_strategy: str = "end"
    forget: Literal["class", "examples"] = "examples"
    own_samples: int | None = None
    learning_rate: float | None = None
    num_train_epochs: float | None = None
    per_device_train_batch_size: int = 16
    retain_per_forget: int = 2
    isotropic_weight: float = 0.0

    def _check_unlearn_arguments(self) -> None:
        super()._check_unlearn_arguments()
        check_fields(self, {"≥ 0": ("own_samples",)})
        for name in ("packing", "eval_packing", "padding_free"):
            if getattr(self, name):
                raise ValueError(f"{name}=True: takes away the boundaries between examples; set {name}=False")
        if self.loss_type != "nll":
            raise ValueError(f"loss_type={self.loss_type!r}: only 'nll' is supported; see forget_loss")
