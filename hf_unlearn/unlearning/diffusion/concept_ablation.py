"""Concept ablation: the concept's prompt answered as an anchor's, on images of the anchor (arXiv 2303.13516, ICCV 2023)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from .encoded import EncodedImages, encode_prompts
from .own_samples import FORGET_SEED
from .redirect_prompts import OwnAnswerTrainer, RedirectPromptsConfig


KEYS_AND_VALUES = ["*.attn2.to_k.*", "*.attn2.to_v.*"]


@dataclass
class ConceptAblationConfig(RedirectPromptsConfig):
    """Configuration of [`ConceptAblationTrainer`]: [`RedirectPromptsConfig`] and these. `forget_prompts` name the concept, `redirect_prompt`
    the anchor in their place: one for all, or one for each.

    Other defaults than there, the authors' for Stable Diffusion 1: learning rate 1.6e-5 (their 2e-6, times a batch of 4 on two GPUs), 100
    steps of 8 images, AdamW with a weight decay of 0.01, 1,000 anchor images, keys and values of cross-attention (where there is
    none, what reads the prompt), a plain squared error (`loss_weighting="simple"`), no guard. With `own_samples` the denoising error on samples of `replay_prompts` is added, as theirs do
    where the anchor's name is within the concept's ("grumpy cat").
    """

    forget_loss: ClassVar[str] = "redirect"  # a class attribute is no field: concept ablation has one loss

    learning_rate: float = 1.6e-5
    weight_decay: float = 0.01
    per_device_train_batch_size: int = 8
    max_steps: int = 100
    loss_weighting: Literal["simple", "elbo", "min_snr"] = "simple"
    forget_samples: int = 1000
    own_samples: int = 0
    guard: bool = False

    def _check_unlearn_arguments(self) -> None:
        super()._check_unlearn_arguments()
        if not self.forget_prompts:
            raise ValueError(
                "forget_prompts: missing; name prompts that ask for the concept, and anchors in redirect_prompt"
            )


class ConceptAblationTrainer(OwnAnswerTrainer):
    r"""Makes a prompted diffusion model answer prompts for a concept as it answers those for an anchor: their model-based variant.

    $$ \big\lVert \epsilon_\theta(x_t, c) - \mathrm{sg}[\epsilon_\theta(x_t, c^*)] \big\rVert^2 $$

    x_t are noisy images that the original drew for the anchor's prompt c*. The target is the student's own answer, as in the paper and its
    code, not the original's. Arguments as for [`~hf_unlearn.unlearning.diffusion.trainer.DiffusionUnlearnTrainer`], `args` a
    [`ConceptAblationConfig`] with `forget_prompts`.

    ```python
    args = ConceptAblationConfig("without-cats", forget_prompts=["a grumpy cat"], redirect_prompt="a cat")
    trainer = ConceptAblationTrainer(pipeline=pipe, args=args)
    trainer.train()
    ```
    """

    _method = "concept_ablation"
    _title = "Concept ablation"
    _paper = "2303.13516"
    _config_class = ConceptAblationConfig

    def _settled(self, args: ConceptAblationConfig, forget_dataset: Any) -> ConceptAblationConfig:
        args = copy.copy(args)
        crosses = "*.attn2.*" in self.architecture.reads_prompts
        args.trainable = args.trainable or (KEYS_AND_VALUES if crosses else ["cross_attention"])
        return super()._settled(args, forget_dataset)

    def _from_prompts(self, args: ConceptAblationConfig, prompts: list[str]) -> EncodedImages:
        """Images of the anchors, with the prompts that are to be answered like theirs."""
        images = self.drawn(args, args.redirected(prompts), FORGET_SEED, "anchor")
        told = encode_prompts(prompts, self.pipeline, device=args.device, guidance_scale=args.guidance_scale)
        return EncodedImages(images.latents, None, *told, sorted(set(prompts)))
