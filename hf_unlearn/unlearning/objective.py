"""What an unlearning trainer minimises: forget, retain and replay losses, and the anchor. A method overrides these hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..files import load_tensors, save_tensors
from ..parameters.anchors import Anchor, QuadraticAnchor, SumOfAnchors
from ..parameters.fisher import diagonal_fisher
from ..parameters.lora import LoRAProductAnchor, lora_layers
from ..parameters.reference import ReferencePoint
from ..training.collators import ALTERNATE
from ..training.losses import IGNORED, cross_entropy, mean_of_counted
from .classifiers.objective import ClassifierObjective
from .classifiers.replay import perturb_images
from .classifiers.sever import Sever
from .forget_loss import Ascent, ForgetLoss, Match, Npo, Redirect, Uniform
from .language.ceu import Ceu
from .language.objective import LanguageObjective
from .language.pdu import Pdu
from .language.preference import AltPo, Dpo, IdkDpo
from .language.replay import ordinary_tokens, perturb_tokens
from .language.rmu import Rmu
from .language.simnpo import SimNpo
from .language.undial import Undial
from .language.weighted_ascent import SatImp, Wga


Batch = Mapping[str, Tensor]
FORGET_LOSSES: dict[str, type[ForgetLoss]] = {
    loss.name: loss
    for loss in (
        Ascent, Npo, Redirect, Sever, Uniform, Match, SimNpo, Undial, Wga, SatImp, Ceu, Dpo, IdkDpo, AltPo, Rmu, Pdu,
    )
}  # fmt: skip


def takes_pairs(name: str) -> bool:
    """Whether a `forget_loss` reads answers that are wanted instead; "bounded" means none that does."""
    return name in FORGET_LOSSES and FORGET_LOSSES[name].paired


class ObjectiveMixin:
    """The terms of the loss. `prepared`, `task_loss`, `forget_loss`, `retain_loss`, `replay_inputs` and `build_anchor` are
    for methods to override.
    """

    reference: ReferencePoint | None
    forgetting: ForgetLoss | None = None
    forgotten_classes: list[int]

    @cached_property
    def family(self) -> ClassifierObjective | LanguageObjective:
        """What depends on the kind of model."""
        if self.is_classifier:
            return ClassifierObjective(self.args, self.model.config.num_labels, self.forgotten_classes)
        return LanguageObjective(self.args)

    def _settle_forget_loss(self) -> None:
        """Which loss `forget_loss` means here, made.

        Raises:
            ValueError: a choice that this model or these data do not allow.
        """
        self.forget_loss_name = self._choose_forget_loss()
        self.forgetting = FORGET_LOSSES[self.forget_loss_name](self)

    def _choose_forget_loss(self) -> str:
        has_target = self.args.heldout_loss is not None or self.heldout_dataset is not None
        bounded = self.family.choose(has_target, self.model)
        name = bounded if self.args.forget_loss == "bounded" else self.args.forget_loss
        self._check_is_for(name)
        return name

    @property
    def has_alternates(self) -> bool:
        """Whether the forget rows have answers that are wanted instead, or will have."""
        return ALTERNATE in self.forget_dataset[0]

    def _check_is_for(self, name: str) -> None:
        if FORGET_LOSSES[name].of_texts and not self.is_causal_lm:
            raise ValueError(f"forget_loss={name!r}: is for language models; use 'redirect', or leave it out")

    # The losses

    def predictions(self, forward: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits `[batch, …, classes]` and the targets `[batch, …]` they answer, −100 where none."""
        return self.family.answers(forward, self.inputs_of(batch), self.labels_of(batch))

    def counted(self, forward: Callable, batch: Batch, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits `[predictions, classes]` of the predictions that count alone, example after example, and the targets of all `[batch, …]`.

        Args:
            labels (`Tensor`, *optional*): in the place of the batch's.
        """
        if self.is_causal_lm:
            labels = self.labels_of(batch) if labels is None else labels
            return self.family.counted(forward, self.inputs_of(batch), labels, self.model)
        logits, targets = self.predictions(forward, batch)
        return logits[targets != IGNORED], targets

    def inputs_of(self, batch: Batch) -> dict[str, Tensor]:
        """What of a batch the model reads."""
        self._set_signature_columns_if_needed()
        others = (*self.label_names, ALTERNATE)
        inputs = {k: v for k, v in batch.items() if k not in others and k in self._signature_columns}
        if self.is_causal_lm:  # SFTTrainer's signature leaves it out
            inputs.setdefault("attention_mask", batch.get("attention_mask"))
        return inputs

    def labels_of(self, batch: Batch) -> Tensor:
        """The labels of a batch.

        Raises:
            ValueError: it has none.
        """
        label = self.label_names[0] if self.label_names else "labels"
        if label not in batch:
            raise ValueError(f"{label}: missing in the batch; the collator or the dataset must provide it")
        return batch[label]

    def prepared(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with whatever is drawn at random in it, so that student and original see the same. Default: nothing is."""
        return batch

    def reference_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model as it was before unlearning (its adapter as it was, if it has one)."""
        return self.reference(self.model, *args, **kwargs)

    def task_loss(self, model: Callable, batch: Batch) -> Tensor:
        """Loss of each example under the model's own task: `[batch]`, mean over its predictions."""
        logits, targets = self.counted(model, batch)
        return mean_of_counted(cross_entropy(logits, targets[targets != IGNORED]), targets)

    def forget_loss(self, model: Callable, batch: Batch) -> Tensor:
        """What is minimised on the forget examples; a scalar or one value per example.

        By default every term is a mean over the predictions of an example, the tokens of a text, and then over examples: so weights
        compare tokens with tokens. NPO's log π is of the whole text, ℓT with ℓ the mean over its T tokens, as in the paper;
        there its gradient is −W·T·∇ℓ with W = 2π^β/(π^β + π*^β), T times as strong as a retain term's ∇ℓ: what is to be kept
        goes first. Divided by T it is −W·∇ℓ, at the original (W = 1) as strong as the retain term, and W still tends to 0 as
        the text as a whole is forgotten. `loss_reduction="sum"` is the paper's.
        """
        values = self._forget_means(model, batch)
        return values * self._counts(batch) if self.args.loss_reduction == "sum" else self.by_token(values, batch)

    def _counts(self, batch: Batch) -> Tensor:
        return self.family.counts(self.labels_of(batch), batch.get("attention_mask"))

    def by_token(self, values: Tensor, batch: Batch) -> Tensor:
        """With `loss_reduction="token"` means of examples, weighted so that their mean is that over all tokens of the batch."""
        if self.args.loss_reduction != "token":
            return values
        counts = self._counts(batch)
        return values * counts * len(counts) / counts.sum().clamp(min=1)

    def _forget_means(self, model: Callable, batch: Batch) -> Tensor:
        return self.forgetting.means(model, batch)

    def of_whole_texts(self, model: Callable, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """−log π and −log π* of all predictions of an example together, and how many count, `[batch]` each."""
        count = self._counts(batch).clamp(min=1)
        return *(self.task_loss(forward, batch) * count for forward in (model, self.reference_forward)), count

    def retain_loss(self, model: Callable, batch: Batch) -> Tensor:
        """What is minimised on the retain examples: the task's own loss, or the divergence from the original's answers, unless the forget
        loss has one of its own; `[batch]`.
        """
        return self.forgetting.retain_loss(model, batch)

    def seen_together(self, model: Callable, forget: Batch, replayed: Batch | None) -> AbstractContextManager[None]:
        """Within, a step's losses are computed of these batches; a family may answer both at once."""
        return nullcontext()

    def replay_inputs(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Inputs related to the forget examples on which the original says what is to be kept; see [`hf_unlearn.unlearning.classifiers.replay`]."""
        batch = dict(batch)
        if "pixel_values" in batch and batch["pixel_values"].dim() == 4:
            batch["pixel_values"] = perturb_images(batch["pixel_values"], generator)
        elif "input_ids" in batch:
            vocabulary = self._vocabulary.to(batch["input_ids"].device)
            batch["input_ids"] = perturb_tokens(batch["input_ids"], batch.get("attention_mask"), vocabulary, generator)
        else:
            raise ValueError(
                f"replay_weight: no data-free replay is known for inputs {', '.join(batch)}; set replay_weight=0, pass "
                "retain_dataset=, or override replay_inputs"
            )
        return batch

    @cached_property
    def _vocabulary(self) -> Tensor:
        return ordinary_tokens(self.model, self.processing_class)

    def replay_loss(self, model: Callable, batch: Batch) -> Tensor:
        """Divergence from the original on replay inputs, over the classes to be kept: `[batch]`, nats."""
        labels = self.family.replayed(batch) if self.is_causal_lm else None
        reference_logits, _ = self.counted(self.reference_forward, batch, labels)
        logits, targets = self.counted(model, batch, labels)
        return mean_of_counted(self.family.replay_divergence(logits, reference_logits), targets)

    @property
    def replay_weight(self) -> float:
        if self.args.replay_weight is not None:
            return self.args.replay_weight
        return self.forgetting.replay_weight if self.retain_dataset is None else 0.0

    @property
    def fisher_weight(self) -> float:
        return self.args.fisher_weight or 0.0

    def build_anchor(self) -> Anchor | None:
        """The penalty in parameter space around `self.reference`, which is what the arguments ask for."""
        args, reference = self.args, self.reference.parameters
        if not (args.isotropic_weight or self.fisher_weight):
            return None
        if hasattr(self.model, "peft_config"):
            layers = lora_layers(self.model)
            factored = {name for a, b, _ in layers for name in (a, b)}
            whole = {name: value for name, value in reference.items() if name not in factored}
            anchors: list[Anchor] = [LoRAProductAnchor(reference, layers, isotropic=args.isotropic_weight)]
            if whole:
                anchors.append(QuadraticAnchor(whole, isotropic=args.isotropic_weight))
            return SumOfAnchors(*anchors)
        return QuadraticAnchor(
            reference,
            isotropic=args.isotropic_weight,
            diagonal=self._fisher() if self.fisher_weight else None,
            diagonal_weight=self.fisher_weight,
        )

    def _fisher(self) -> dict[str, Tensor]:
        """The Fisher information at θ*; a resumed run reads what the first one computed."""
        file = self.private_dir / "fisher.safetensors"
        if self._resuming:
            if not file.is_file():
                raise ValueError(f"resume_from_checkpoint: {file} is missing; start again, or set fisher_weight=0")
            return load_tensors(file, self.args.device)
        fisher = self._compute_fisher()
        if self.args.should_save:
            save_tensors(fisher, file)
        return fisher

    def _compute_fisher(self) -> dict[str, Tensor]:
        return diagonal_fisher(
            self.model,
            self._batches(self.forget_dataset, self.args.fisher_examples),
            self.predictions,
            method=self.args.fisher,
            samples=self.args.fisher_samples,
            generator=torch.Generator(self.args.device).manual_seed(self.args.seed),
        )
