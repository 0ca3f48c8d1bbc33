"""Settings that every method of making a diffusion model forget has in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ...training.checks import REFUSED, REFUSED_OF_IMAGES, check_fields
from ...training.config import DRAWING_RANGES, DrawingArguments
from ..config import UnlearnConfig


RANGES = {
    "> 0": ("snr_gamma",),
    "≥ 0": ("own_samples",),
    "≥ 1": ("lora_rank", "lora_alpha", "forget_samples", "num_inference_steps"),
    "in [0, 1)": ("ema_decay",),
}
NO_KWARGS = "diffusers' denoisers take none; leave it out"


@dataclass
class DiffusionUnlearnConfig(DrawingArguments, UnlearnConfig):
    """Configuration of [`~hf_unlearn.unlearning.diffusion.trainer.DiffusionUnlearnTrainer`]: [`UnlearnConfig`] and these.

    Other defaults than there: `isotropic_weight` 0, a look of the guard every 50 steps, `utility_tolerance` 0.5 of the
    original's own denoising error, `replay_weight` 1 for `redirect` (4 of prompts) and 10 for other losses. `heldout_loss` is a denoising error.

    What labels or texts need is no setting here: `forget`, `forget_accuracy`, `bn`, `fisher`, `fisher_samples`, `loss_reduction`,
    `retain_loss`, `rmu_layer`, `rmu_coefficient`, `pdu_rate`.

    > The denoising loss
        loss_weighting (`"simple"` | `"elbo"` | `"min_snr"`, defaults to `"min_snr"`): w_t; see [`~hf_unlearn.training.noise.NoiseSchedule`].
        snr_gamma (`float`, defaults to 1.0): γ of `min_snr`: errors of the clean image count alike where the signal-to-noise
            ratio is above, those of the noise where it is below.
        t_range (`list[float]`, defaults to `[0, 1]`): the share of the timesteps that noise is drawn from, 0 without noise.
        ema_decay (`float`, defaults to 0.0): decay of an average of the weights, which replaces them at the end; 0 for none.

    > What is trained
        trainable (`list[str]`, *optional*): `all`, `cross_attention`, `lora`, or patterns of parameter names (`*` and `?`); with a `!` before
            it, all but these. Default: `all`, and where a method redirects prompts `cross_attention`, by which other images are changed the
            least.
        lora_rank, lora_alpha (`int`, default to 8): of `lora`, on the attention's projections.

    > What to forget, where there are no images
        forget_prompts (`list[str]`, *optional*): the original draws the forget images itself from these prompts.
        forget_samples (`int`, defaults to 100): how many.

    > What to keep
        own_samples (`int`, defaults to 1000): images that the original draws, once, before the first step; 0 for none.
        replay_prompts (`list[str]`, *optional*): with prompts: what it draws. Must not ask for the forgotten concept. Default: what the
            method redirects to, else the empty prompt.
        num_inference_steps (`int`, *optional*): denoising steps of every image drawn. Default: the pipeline's own.
        guidance_scale (`float`, *optional*): of classifier-free guidance. Default: the pipeline's own.
    """

    refused: ClassVar[dict[str, str]] = (
        REFUSED
        | REFUSED_OF_IMAGES
        | {
            "activation_checkpointing_kwargs": NO_KWARGS,
            "gradient_checkpointing_kwargs": NO_KWARGS,
            "include_for_metrics": "evaluate() gives denoising errors, and predicts nothing; leave it out",
            "batch_eval_metrics": "evaluate() gives denoising errors, and predicts nothing; leave it out",
        }
    )

    learning_rate: float = 3e-4
    lr_scheduler_type: str = "constant"
    per_device_train_batch_size: int = 32
    max_steps: int = 200
    save_strategy: str = "no"
    logging_steps: float = 10
    forget: ClassVar[str] = (
        "examples"  # class attributes are no fields: a generator has no labels, no BatchNorm, no classes
    )
    forget_accuracy: ClassVar[float] = 0.0
    bn: ClassVar[str] = "frozen"
    fisher: ClassVar[str] = "exact"
    fisher_samples: ClassVar[int] = 1
    loss_reduction: ClassVar[str] = "example"
    retain_loss: ClassVar[str] = "nll"
    rmu_layer: ClassVar[None] = None
    rmu_coefficient: ClassVar[float] = 1.0
    pdu_rate: ClassVar[float] = 1.0
    isotropic_weight: float = 0.0
    guard_steps: int | None = 50
    loss_weighting: Literal["simple", "elbo", "min_snr"] = "min_snr"
    snr_gamma: float = 1.0
    t_range: list[float] = field(default_factory=lambda: [0.0, 1.0])
    ema_decay: float = 0.0
    trainable: list[str] | None = None
    lora_rank: int = 8
    lora_alpha: int = 8
    forget_prompts: list[str] | None = None
    forget_samples: int = 100
    own_samples: int = 1000
    replay_prompts: list[str] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None

    @property
    def neutral_prompts(self) -> list[str]:
        """Prompts that say nothing of what is forgotten."""
        return [""]

    def _check_unlearn_arguments(self) -> None:
        super()._check_unlearn_arguments()
        check_fields(self, RANGES)
        check_fields(self, DRAWING_RANGES)
        if self.load_best_model_at_end and self.ema_decay:
            raise ValueError(
                f"load_best_model_at_end: ema_decay={self.ema_decay} would replace the best state by the average; set it to 0"
            )
        if len(self.t_range) != 2 or not 0 <= self.t_range[0] < self.t_range[1] <= 1:
            raise ValueError(f"t_range={self.t_range}: must be two shares, 0 ≤ low < high ≤ 1")
        for name in ("trainable", "forget_prompts", "replay_prompts"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
