"""SalUn: only the weights move on which forgetting depends most (arXiv 2310.12508, ICLR 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import TrainerCallback

from ...files import load_tensors, save_tensors
from ...parameters.anchors import Anchor
from ...parameters.reference import trainable_parameters
from ...parameters.sharding import own, sharded_like
from ...training.checks import check_fields
from .denoiser import is_prompted
from .redirect_prompts import OwnAnswerTrainer, RedirectPromptsConfig


@dataclass
class SalUnConfig(RedirectPromptsConfig):
    """Configuration of [`SalUnTrainer`]: [`RedirectPromptsConfig`] and these. `redirect_prompt` is the other prompt whose answer the
    forget images get.

    Other defaults than there, the authors' for Stable Diffusion 1: learning rate 1e-5, 5 epochs of 800 forget images in batches of 8, Adam,
    all weights, a plain squared error (`loss_weighting="simple"`), 800 own samples of the redirect prompts as what is kept, no guard.
    `retain_weight`, 0.1, is that of the denoising error on those too, unless `replay_weight` is set.

    > Which weights move
        saliency (`float`, defaults to 0.5): share of the weights, in (0, 1], that move: those with the largest gradient of the denoising error of
            the guided answer on the forget images.
    """

    forget_loss: ClassVar[str] = "redirect"  # a class attribute is no field: SalUn has one loss

    learning_rate: float = 1e-5
    per_device_train_batch_size: int = 8
    num_train_epochs: float = 5.0
    max_steps: int = -1
    loss_weighting: Literal["simple", "elbo", "min_snr"] = "simple"
    forget_samples: int = 800
    own_samples: int = 800
    retain_weight: float = 0.1
    guard: bool = False
    saliency: float = 0.5

    def _check_unlearn_arguments(self) -> None:
        super()._check_unlearn_arguments()
        check_fields(self, {"in (0, 1]": ("saliency",)})
        if "lora" in (self.trainable or ()):
            raise ValueError("trainable='lora': SalUn chooses among the model's own weights; train these")


class SalUnTrainer(OwnAnswerTrainer):
    r"""Makes a prompted diffusion model answer the prompt of the forget images as it answers another one, by the weights with
    the largest gradient of the forget loss alone:

    $$ m = \mathbb 1\big[\,|\nabla_\theta\, \ell_f(\theta_0)| \ge \gamma\,\big], \qquad
       \min_{\theta = \theta_0 + m \odot \Delta}\ \big\lVert \epsilon_\theta(x_t, c) - \mathrm{sg}[\epsilon_\theta(x_t, c')] \big\rVert^2
       + \alpha\, \ell_r(\theta) $$

    with ℓ_f the denoising error of the guided answer on noisy forget images, γ such that a given share moves, and ℓ_r the denoising error on
    what is kept. Arguments as for [`~hf_unlearn.unlearning.diffusion.trainer.DiffusionUnlearnTrainer`], `args` a [`SalUnConfig`].

    Attributes:
        mask (`dict[str, Tensor]`): which entries of each trainable parameter move, bool; known when training has begun.
    """

    _method = "salun"
    _title = "Saliency unlearning (SalUn)"
    _paper = "2310.12508"
    _config_class = SalUnConfig
    _told = ("saliency",)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not is_prompted(self.pipeline):
            raise ValueError("pipeline: this model takes no prompts, which SalUn exchanges; pass a prompted one")
        if self.is_adapter:
            raise ValueError("peft_config: SalUn chooses among the model's own weights; leave it out")
        self.mask: dict[str, Tensor] = {}
        self.add_callback(_OthersStay(self))

    @property
    def replay_weight(self) -> float:
        of_both = self.own is not None and self.args.replay_weight is None
        return self.args.retain_weight if of_both else super().replay_weight

    def build_anchor(self) -> Anchor | None:
        file = self.private_dir / "saliency.safetensors"
        if self._resuming:
            if not file.is_file():
                raise ValueError(f"resume_from_checkpoint: {file} is missing; start again")
            self.mask = load_tensors(file, self.args.device)
        else:
            self.mask = largest(self._saliency(), self.args.saliency)
            if self.args.should_save:
                save_tensors(self.mask, file)
        return super().build_anchor()

    def _saliency(self) -> dict[str, Tensor]:
        """The gradient of the denoising error of the guided answer, summed over the forget images."""
        weights = trainable_parameters(self.model)
        total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        with self._looking(), torch.enable_grad():
            for batch in self._batches(self.forget_dataset, None):
                _, target = self.predictions(self.reference_forward, batch)
                loss = self._error(self.guided(self.model, batch), target, batch).sum()
                found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for name, gradient in zip(weights, found, strict=True):
                    if gradient is not None:
                        total[name] += gradient
        return total

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        weights = trainable_parameters(self.model)
        self.mask = {name: sharded_like(mask, weights[name]) for name, mask in self.mask.items()}
        return prepared

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            for name, weight in trainable_parameters(self.model).items():
                if weight.grad is not None:
                    own(weight.grad).mul_(own(self.mask[name]))
        return loss


class _OthersStay(TrainerCallback):
    """Puts the weights back that may not move: an optimiser moves some that have no gradient, as weight decay does."""

    def __init__(self, trainer: SalUnTrainer):
        self.trainer = trainer

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        before = self.trainer.reference.parameters
        for name, weight in trainable_parameters(self.trainer.model).items():
            now, first = own(weight), own(before[name])
            torch.where(own(self.trainer.mask[name]), now, first.to(now), out=now)


@torch.no_grad()
def largest(gradients: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Which entries are among the largest of all tensors together in absolute value, bool; zeros never are, and ties all.

    The threshold is found exactly, by halving: numbers ≥ 0 in single precision are in the order of their bits. Nothing is sorted.

    Args:
        gradients (`Mapping[str, Tensor]`): of any sizes.
        share (`float`): in (0, 1], of all entries.

    Raises:
        ValueError: a gradient is not finite.
    """
    bits = {name: gradient.abs().float().view(torch.int32) for name, gradient in gradients.items()}
    if not all(gradient.isfinite().all() for gradient in gradients.values()):
        raise ValueError(
            "forget_dataset: the gradient of the denoising error on it is not finite, so nothing is salient"
        )
    wanted = max(1, int(share * sum(value.numel() for value in bits.values())))
    low, high = 1, 2**31 - 1  # the least that is not zero, and more than any
    while high - low > 1:
        middle = (low + high) // 2
        enough = sum(int((value >= middle).sum()) for value in bits.values()) >= wanted
        low, high = (middle, high) if enough else (low, middle)
    return {name: value >= low for name, value in bits.items()}
