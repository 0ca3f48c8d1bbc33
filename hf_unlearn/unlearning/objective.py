"""What an unlearning trainer minimises: forget, retain and replay losses, and the anchor. A method overrides these hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..files import save_tensors
from ..parameters.anchors import Anchor, QuadraticAnchor, SumOfAnchors
from ..parameters.fisher import diagonal_fisher
from ..parameters.lora import LoRAProductAnchor, lora_layers
from ..parameters.reference import ReferencePoint
from ..training.losses import IGNORED, cross_entropy, mean_over_predictions
from . import losses
from .classifiers.replay import perturb_images
from .language.replay import perturb_tokens
from .losses import divergence


Batch = Mapping[str, Tensor]
# `match` and `npo` change what the model says of single examples, which inputs made from them pull against.
DEFAULT_REPLAY_WEIGHT = {"match": 0.1, "npo": 1.0}


class ObjectiveMixin:
    """The terms of the loss. `prepared`, `task_loss`, `forget_loss`, `retain_loss`, `replay_inputs` and `build_anchor` are
    for methods to override.
    """

    reference: ReferencePoint | None
    forgotten_classes: list[int]

    def _choose_forget_loss(self) -> str:
        """Which loss `forget_loss` means here.

        Raises:
            ValueError: a choice that this model or these data do not allow.
        """
        args = self.args
        has_target = args.heldout_loss is not None or self.heldout_dataset is not None
        if args.forget == "class" and not self.is_classifier:
            raise ValueError(
                "forget='class' needs a classifier; a language model forgets examples: use forget='examples'"
            )
        if args.forget == "class" and len(self.forgotten_classes) >= self.model.config.num_labels:
            raise ValueError("forget_dataset: holds every class of the model, so none is left; use forget='examples'")
        name = args.forget_loss
        if name == "bounded":
            if args.forget == "examples" and has_target:
                name = "match"
            else:
                name = "redirect" if args.forget == "class" else "npo"
            if self.is_classifier and args.forget == "examples" and not has_target:
                raise ValueError(
                    "heldout_dataset: missing; single examples are forgotten when their loss is that of unseen data: pass "
                    "heldout_dataset= or heldout_loss="
                )
        if name == "match" and not has_target:
            raise ValueError("forget_loss='match' needs a target: pass heldout_dataset= or heldout_loss=")
        return name

    # The losses

    def predictions(self, forward: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits `[batch, …, classes]` and the targets `[batch, …]` they answer, −100 where none."""
        self._set_signature_columns_if_needed()
        label = self.label_names[0] if self.label_names else "labels"
        if label not in batch:
            raise ValueError(f"{label}: missing in the batch; the collator or the dataset must provide it")
        inputs = {k: v for k, v in batch.items() if k not in self.label_names and k in self._signature_columns}
        if self.is_classifier:
            return forward(**inputs).logits, batch[label]
        inputs.setdefault("attention_mask", batch.get("attention_mask"))  # SFTTrainer's signature leaves it out
        return forward(**inputs, use_cache=False).logits[:, :-1], batch[label][:, 1:]

    def prepared(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with whatever is drawn at random in it, so that student and original see the same. Default: nothing is."""
        return batch

    def reference_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model as it was before unlearning (its adapter as it was, if it has one)."""
        return self.reference(self.model, *args, **kwargs)

    def task_loss(self, model: Callable, batch: Batch) -> Tensor:
        """Loss of each example under the model's own task: `[batch]`, mean over its predictions."""
        return cross_entropy(*self.predictions(model, batch))

    def forget_loss(self, model: Callable, batch: Batch) -> Tensor:
        """What is minimised on the forget examples; a scalar or one value per example."""
        if self.forget_loss_name == "ascent":
            return losses.ascent(self.task_loss(model, batch))
        if self.forget_loss_name == "match":
            return losses.match(self.task_loss(model, batch), self.heldout_loss)
        logits, targets = self.predictions(model, batch)
        if self.forget_loss_name == "uniform":
            return mean_over_predictions(losses.uniform(logits), targets)
        reference_logits, _ = self.predictions(self.reference_forward, batch)
        if self.forget_loss_name == "npo":
            count = (targets != IGNORED).reshape(len(targets), -1).sum(1)  # log π of a text is a sum over tokens
            nll, reference_nll = (cross_entropy(z, targets) * count for z in (logits, reference_logits))
            return losses.npo(nll, reference_nll, self.args.npo_beta)
        values = losses.redirect(logits, reference_logits, self._excluded(logits, targets))
        return mean_over_predictions(values, targets)

    def _excluded(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Which classes `redirect` takes away: the forgotten ones, or each prediction's own target."""
        excluded = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        if self.args.forget == "class":
            excluded[self.forgotten_classes] = True
            return excluded
        return excluded.expand_as(logits).scatter(-1, targets.clamp(min=0).unsqueeze(-1), True)

    def retain_loss(self, model: Callable, batch: Batch) -> Tensor:
        """What is minimised on the retain examples: the task's own loss, if there are any."""
        return self.task_loss(model, batch)

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
        """Token ids that are no special tokens."""
        config, size = self.model.config, self.model.get_input_embeddings().weight.shape[0]
        special = set(getattr(self.processing_class, "all_special_ids", ()))
        added = getattr(
            self.processing_class, "added_tokens_decoder", {}
        )  # chat control tokens have no name of their own
        special |= {index for index, token in added.items() if token.special}
        if isinstance(self.processing_class, PreTrainedTokenizerBase):
            size = min(size, len(self.processing_class))  # embeddings are often padded to a round number
        for kind in ("pad", "bos", "eos", "unk", "cls", "sep"):
            token = getattr(config, f"{kind}_token_id", None)
            special.update(token if isinstance(token, list) else [token])  # Llama 3 has several eos tokens
        return torch.tensor([i for i in range(size) if i not in special])

    def replay_loss(self, model: Callable, batch: Batch) -> Tensor:
        """Divergence from the original on replay inputs, over the classes to be kept: `[batch]`, nats."""
        reference_logits, targets = self.predictions(self.reference_forward, batch)
        logits, _ = self.predictions(model, batch)
        if self.is_classifier:
            excluded = self._excluded(logits[0], targets[:1]) if self.args.forget == "class" else None
            return divergence(logits, reference_logits, excluded)
        values = divergence(logits, reference_logits)
        if (mask := batch.get("attention_mask")) is None:
            return values.mean(1)
        real = (mask[:, :-1] * mask[:, 1:]).bool()  # a token that predicts a token, wherever the padding is
        return mean_over_predictions(values, torch.where(real, 0, IGNORED))

    @property
    def replay_weight(self) -> float:
        if self.args.replay_weight is not None:
            return self.args.replay_weight
        return DEFAULT_REPLAY_WEIGHT.get(self.forget_loss_name, 5.0) if self.retain_dataset is None else 0.0

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
            return {name: value.to(self.args.device) for name, value in load_file(file).items()}
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
