"""Settings of every unlearning trainer. A recipe's keys are these fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments
from trl import SFTConfig


FORGET_LOSSES = ("bounded", "ascent", "npo", "redirect", "uniform", "match")


@dataclass
class UnlearnArguments:
    """What unlearning adds to [`~transformers.TrainingArguments`]. The loss of a step is

    `forget_weight · forget + retain_weight · retain + replay_weight · replay + anchor`.

    > What to forget
        forget (`"class"` | `"examples"`, defaults to `"class"`): delete every trace of the labels in the forget set, or
            only of these examples. The right answers differ: a model that never saw an example may still classify it.
        forget_loss (`str`, defaults to `"bounded"`): `"ascent"`, `"npo"`, `"redirect"`, `"uniform"`, `"match"`, or
            `"bounded"`, which chooses: `"match"` where the loss of held-out data is known, else `"redirect"` to forget a
            class from a classifier and `"npo"` for language models.
        forget_weight (`float`, defaults to 1.0): weight of the forget loss, > 0.
        npo_beta (`float`, defaults to 0.1): inverse temperature β of NPO.
        heldout_loss (`float`, *optional*): mean loss, in nats, of data the model has never seen: the target of
            `forget="examples"`. Computed from `heldout_dataset=` when that is given.

    > What to keep
        retain_weight (`float`, defaults to 1.0): weight of the task loss on `retain_dataset=`, if there is one.
        replay_weight (`float`, *optional*): weight of the data-free replay. Default: 5 (`npo`: 1, `match`: 0.1), or 0 with a
            `retain_dataset=`.
        isotropic_weight (`float`, defaults to 0.1): γ of the anchor γ‖θ−θ*‖², a sum over parameters; under LoRA, over
            the change of the product BA.
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
        guard_examples (`int`, defaults to 512): forget examples looked at, at most.
        guard_patience (`int`, defaults to 3): looks at a forgotten model without better utility before stopping.
        forget_accuracy (`float`, defaults to 0.01): with `forget="class"`: the accuracy on the forget set, in [0, 1], at
            or below which the class counts as forgotten.
        utility_tolerance (`float`, *optional*): how far utility may fall: accuracy on the `"retain"` evaluation set (in
            [0, 1], default 0.02), or for language models the rise of its loss in nats per token (default 0.1, a
            perplexity 1.1 times as high); where there is no such set, on `retain_dataset`; without either, divergence
            from the original on replay inputs, in nats (default 0.5).

    > Data and output
        id_column (`str`, defaults to `"id"`): column that identifies examples. Where forget and retain sets both have
            it they must not overlap.
        merge_adapter (`bool`, defaults to `True`): save the model with the adapter merged into it. An adapter alone can be
            taken off again, which undoes the unlearning.
    """

    _argument_group_name = "unlearning"

    forget: Literal["class", "examples"] = field(
        default="class", metadata={"help": "Delete a class, or single examples."}
    )
    forget_loss: Literal["bounded", "ascent", "npo", "redirect", "uniform", "match"] = field(
        default="bounded", metadata={"help": "What the model is asked to say about the forget set."}
    )
    forget_weight: float = field(default=1.0, metadata={"help": "Weight of the forget loss."})
    npo_beta: float = field(default=0.1, metadata={"help": "Inverse temperature of NPO."})
    heldout_loss: float | None = field(
        default=None,
        metadata={"help": "Mean loss of unseen data in nats: the target when single examples are deleted."},
    )
    retain_weight: float = field(default=1.0, metadata={"help": "Weight of the loss on the retain set, if given."})
    replay_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of data-free replay. Default: 5 (npo 1, match 0.1), 0 with a retain set."},
    )
    isotropic_weight: float = field(default=0.1, metadata={"help": "Weight of the squared distance to the original."})
    fisher_weight: float = field(default=0.0, metadata={"help": "Weight of the Fisher-weighted squared distance."})
    fisher: Literal["exact", "monte_carlo"] = field(
        default="exact", metadata={"help": "Sum over all classes, or over labels drawn from the model."}
    )
    fisher_samples: int = field(default=1, metadata={"help": "Labels drawn per prediction, Monte-Carlo only."})
    fisher_examples: int | None = field(default=256, metadata={"help": "Forget examples used for the Fisher."})
    bn: Literal["frozen", "train"] = field(
        default="frozen", metadata={"help": "BatchNorm statistics while unlearning."}
    )
    guard: bool = field(default=True, metadata={"help": "Stop when forgotten, restore when utility falls."})
    guard_steps: int | None = field(default=None, metadata={"help": "Steps between two looks. Default: an epoch."})
    guard_examples: int = field(default=512, metadata={"help": "Forget examples looked at, at most."})
    guard_patience: int = field(default=3, metadata={"help": "Looks without improvement before stopping."})
    forget_accuracy: float = field(default=0.01, metadata={"help": "Accuracy at which a class counts as forgotten."})
    utility_tolerance: float | None = field(
        default=None, metadata={"help": "How far utility may fall; see the docs for its unit."}
    )
    id_column: str = field(default="id", metadata={"help": "Column that identifies examples."})
    merge_adapter: bool = field(default=True, metadata={"help": "Save the model with the adapter merged into it."})

    def __post_init__(self):
        super().__post_init__()
        self._check_unlearn_arguments()

    def _check_unlearn_arguments(self) -> None:
        if self.forget not in ("class", "examples"):
            raise ValueError(f"forget={self.forget!r}: must be 'class' or 'examples'")
        if self.forget_loss not in FORGET_LOSSES:
            raise ValueError(f"forget_loss={self.forget_loss!r}: must be one of {', '.join(FORGET_LOSSES)}")
        if self.fisher not in ("exact", "monte_carlo"):
            raise ValueError(f"fisher={self.fisher!r}: must be 'exact' or 'monte_carlo'")
        if self.bn not in ("frozen", "train"):
            raise ValueError(f"bn={self.bn!r}: must be 'frozen' or 'train'")
        for name in ("forget_weight", "npo_beta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be > 0")
        for name in ("retain_weight", "replay_weight", "isotropic_weight", "fisher_weight", "utility_tolerance"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be ≥ 0")
        for name in ("fisher_samples", "fisher_examples", "guard_steps", "guard_examples", "guard_patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be ≥ 1")
        if not 0 <= self.forget_accuracy < 1:
            raise ValueError(f"forget_accuracy={self.forget_accuracy}: must be in [0, 1)")
        if self.push_to_hub and str(getattr(self.hub_strategy, "value", self.hub_strategy)) != "end":
            raise ValueError(
                f"hub_strategy={getattr(self.hub_strategy, 'value', self.hub_strategy)!r}: uploads half-forgotten weights; "
                "use hub_strategy='end'"
            )


@dataclass
class UnlearnConfig(UnlearnArguments, TrainingArguments):
    __doc__ = f"Configuration of [`UnlearnTrainer`]: [`~transformers.TrainingArguments`] and these.\n{UnlearnArguments.__doc__}"

    hub_strategy: str = field(default="end", metadata={"help": "Only 'end': nothing half-forgotten is uploaded."})


@dataclass
class UnlearnSFTConfig(UnlearnArguments, SFTConfig):
    __doc__ = f"Configuration of [`UnlearnSFTTrainer`]: [`~trl.SFTConfig`] and these.\n{UnlearnArguments.__doc__}"

    hub_strategy: str = field(default="end", metadata={"help": "Only 'end': nothing half-forgotten is uploaded."})
    forget: Literal["class", "examples"] = field(
        default="examples", metadata={"help": "Instruction data has no classes: single examples are deleted."}
    )

    def _check_unlearn_arguments(self) -> None:
        super()._check_unlearn_arguments()
        for name in ("packing", "eval_packing", "padding_free"):
            if getattr(self, name):
                raise ValueError(f"{name}=True: takes away the boundaries between examples; set {name}=False")
        if self.loss_type != "nll":
            raise ValueError(f"loss_type={self.loss_type!r}: only 'nll' is supported; see forget_loss")
