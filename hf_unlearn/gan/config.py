"""Settings of GAN training. A recipe's keys are these fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transformers import TrainingArguments

from ..training.checks import REFUSED, REFUSED_OF_IMAGES, check_fields, check_hub_strategy, check_stock
from ..training.config import GUARD_RANGES, IMAGE_RANGES, GuardArguments, ImageArguments, settle


RANGES = {
    "≥ 0": ("r1_weight", "path_length_weight", "discriminator_warmup", "discriminator_learning_rate"),
    "≥ 1": ("r1_every", "path_length_every"),
    "in [0, 1)": ("ema_decay",),
    "in (0, 1)": ("collapse_tolerance",),
}
NONE = "these networks have none; leave it out"
DRAWS = "evaluate() draws images and compares them, and predicts nothing; leave it out"


@dataclass
class GANConfig(ImageArguments, GuardArguments, TrainingArguments):
    """Configuration of [`GANTrainer`]: [`~transformers.TrainingArguments`], [`~hf_unlearn.training.config.GuardArguments`],
    [`~hf_unlearn.training.config.ImageArguments`] and these.

    Other defaults than there: 8,000 steps of Adam with betas (0, 0.99) and a constant learning rate of 2e-3 on batches of
    64, no clipping, no checkpoints.

    > The two players
        discriminator_learning_rate (`float`, *optional*): of the discriminator. Default: `learning_rate`, the generator's.
        r1_weight (`float`, defaults to 1.0): γ of the penalty γ/2·E‖∇D(x)‖² on real images (R1, arXiv 1801.04406).
        r1_every (`int`, defaults to 4): steps between two, each then weighed by so much more (arXiv 1912.04958).
        path_length_weight (`float`, defaults to 0.0): weight of the path-length penalty on a generator with a network `mapping` from
            latents to styles (arXiv 1912.04958), which a DCGAN has not.
        path_length_every (`int`, defaults to 4): steps between two.
        discriminator_warmup (`int`, defaults to 0): first steps in which the discriminator alone moves, for one that is new.
        ema_decay (`float`, defaults to 0.999): of the average of the generator's weights, which is what draws and is saved.

    > When to stop
        guard (`bool`, defaults to `True`): look for mode collapse while training; see [`~hf_unlearn.gan.collapse.CollapseGuard`].
        guard_steps (`int`, *optional*): steps between two looks. Default: a tenth of the run.
        guard_examples (`int`, defaults to 256): images drawn at a look, and real ones they are compared with, at most.
        collapse_tolerance (`float`, defaults to 0.5): coverage below this share of the best one seen counts as collapse, in
            (0, 1).
    """

    refused: ClassVar[dict[str, str]] = (
        REFUSED
        | REFUSED_OF_IMAGES
        | {  # stock fields, and why
            "activation_checkpointing": NONE,
            "gradient_checkpointing": NONE,
            "activation_checkpointing_kwargs": NONE,
            "gradient_checkpointing_kwargs": NONE,
            "auto_find_batch_size": "two players would begin again half trained; set per_device_train_batch_size",
            "fp16": "the two players have one loss scaler; use bf16, or fp32",
            "gradient_accumulation_steps": "two players take turns within a step; raise per_device_train_batch_size instead",
            "optim_target_modules": "one optimiser holds all of both players; leave it out",
            "train_sampling_strategy": "images have no lengths, and are shuffled; leave it out",
            **dict.fromkeys(
                ("prediction_loss_only", "batch_eval_metrics", "include_for_metrics", "eval_accumulation_steps"), DRAWS
            ),
        }
    )

    learning_rate: float = 2e-3
    lr_scheduler_type: str = "constant"
    adam_beta1: float = 0.0
    adam_beta2: float = 0.99
    max_grad_norm: float = 0.0
    remove_unused_columns: bool = False
    max_steps: int = 8_000
    per_device_train_batch_size: int = 64
    save_strategy: str = "no"
    logging_steps: float = 100
    hub_strategy: str = "end"
    discriminator_learning_rate: float | None = None
    r1_weight: float = 1.0
    r1_every: int = 4
    path_length_weight: float = 0.0
    path_length_every: int = 4
    discriminator_warmup: int = 0
    ema_decay: float = 0.999
    guard_examples: int = 256
    collapse_tolerance: float = 0.5

    def __post_init__(self):
        check_stock(self, self.refused)
        settle(self)
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True  # while one player moves, the other's parameters are unused
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "fid"  # there is no loss that could be best
        if self.greater_is_better is None and self.metric_for_best_model in ("fid", "eval_fid"):
            self.greater_is_better = False  # transformers 5.23 takes all for better when larger but losses
        super().__post_init__()
        self._check_gan_arguments()

    def _check_gan_arguments(self) -> None:
        check_hub_strategy(self)
        for ranges in (RANGES, GUARD_RANGES, IMAGE_RANGES):
            check_fields(self, ranges)
        if self.guard_examples < 16:
            raise ValueError(f"guard_examples={self.guard_examples}: must be ≥ 16, or coverage says nothing")
