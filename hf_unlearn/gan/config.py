"""Settings of GAN training. A recipe's keys are these fields."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class GANConfig(TrainingArguments):
    """Configuration of [`GANTrainer`]: [`~transformers.TrainingArguments`] and these.

    Other defaults than there: 8,000 steps of Adam with betas (0, 0.99) and a constant learning rate of 2e-3 on batches of
    64, no clipping, no checkpoints.

    > The two players
        discriminator_learning_rate (`float`, *optional*): of the discriminator. Default: `learning_rate`, the generator's.
        r1_weight (`float`, defaults to 1.0): γ of the penalty γ/2·E‖∇D(x)‖² on real images (R1, arXiv 1801.04406).
        r1_every (`int`, defaults to 4): steps between two, each then weighed by so much more (arXiv 1912.04958).
        path_length_weight (`float`, defaults to 0.0): weight of the path-length penalty on the generator (arXiv 1912.04958).
        path_length_every (`int`, defaults to 4): steps between two.
        discriminator_warmup (`int`, defaults to 0): first steps in which the discriminator alone moves, for one that is new.
        ema_decay (`float`, defaults to 0.999): of the average of the generator's weights, which is what draws and is saved.

    > When to stop
        guard (`bool`, defaults to `True`): look for mode collapse while training; see [`CollapseGuard`].
        guard_steps (`int`, *optional*): steps between two looks. Default: a tenth of the run.
        guard_samples (`int`, defaults to 256): images drawn at a look, and real ones they are compared with, at most.
        collapse_tolerance (`float`, defaults to 0.5): coverage below this share of the best one seen counts as collapse, in
            (0, 1).

    > Images
        resize (`bool`, defaults to `False`): scale and crop images that do not have the model's size.
        sample_batch_size (`int`, defaults to 64): images drawn at a time.
    """

    learning_rate: float = field(default=2e-3, metadata={"help": "Learning rate of the generator."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The scheduler type to use."})
    adam_beta1: float = field(default=0.0, metadata={"help": "Beta1 of Adam."})
    adam_beta2: float = field(default=0.99, metadata={"help": "Beta2 of Adam."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip the generator's gradient; 0 for not."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator takes what it needs."})
    max_steps: int = field(default=8_000, metadata={"help": "Steps; in each, both players move once."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images per step and device."})
    save_strategy: str = field(default="no", metadata={"help": "Checkpoints."})
    logging_steps: float = field(default=100, metadata={"help": "Log every so many steps."})
    hub_strategy: str = field(default="end", metadata={"help": "Only 'end': nothing half-trained is uploaded."})
    discriminator_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the discriminator. Default: the generator's."}
    )
    r1_weight: float = field(default=1.0, metadata={"help": "Weight of the gradient penalty on real images."})
    r1_every: int = field(default=4, metadata={"help": "Steps between two gradient penalties."})
    path_length_weight: float = field(default=0.0, metadata={"help": "Weight of the path-length penalty."})
    path_length_every: int = field(default=4, metadata={"help": "Steps between two path-length penalties."})
    discriminator_warmup: int = field(default=0, metadata={"help": "First steps of the discriminator alone."})
    ema_decay: float = field(default=0.999, metadata={"help": "Decay of the average that draws and is saved."})
    guard: bool = field(default=True, metadata={"help": "Stop at mode collapse and restore the state before it."})
    guard_steps: int | None = field(
        default=None, metadata={"help": "Steps between two looks. Default: a tenth of the run."}
    )
    guard_samples: int = field(default=256, metadata={"help": "Images drawn at a look, at most."})
    collapse_tolerance: float = field(
        default=0.5, metadata={"help": "Share of the best coverage below which training counts as collapsed."}
    )
    resize: bool = field(default=False, metadata={"help": "Scale and crop images of another size."})
    sample_batch_size: int = field(default=64, metadata={"help": "Images drawn at a time."})

    def __post_init__(self):
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True  # while one player moves, the other's parameters are unused
        if self.greater_is_better is None and self.metric_for_best_model in ("fid", "eval_fid"):
            self.greater_is_better = False  # transformers 5.23 takes all for better when larger but losses
        super().__post_init__()
        self._check_gan_arguments()

    def _check_gan_arguments(self) -> None:
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}: two players take turns within a step; "
                "raise per_device_train_batch_size instead"
            )
        if self.fp16:
            raise ValueError("fp16=True: the two players have one loss scaler; use bf16, or fp32")
        if self.push_to_hub and str(getattr(self.hub_strategy, "value", self.hub_strategy)) != "end":
            raise ValueError("hub_strategy: uploads half-trained states; use hub_strategy='end'")
        for name in ("r1_weight", "path_length_weight", "discriminator_warmup"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be ≥ 0")
        for name in ("r1_every", "path_length_every", "guard_steps", "sample_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be ≥ 1")
        if self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing=True: these networks have none; set it to False")
        if self.discriminator_learning_rate is not None and not self.discriminator_learning_rate >= 0:
            raise ValueError(f"discriminator_learning_rate={self.discriminator_learning_rate}: must be ≥ 0")
        if self.guard_samples < 16:
            raise ValueError(f"guard_samples={self.guard_samples}: must be ≥ 16, or coverage says nothing")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: must be in [0, 1)")
        if not 0 < self.collapse_tolerance < 1:
            raise ValueError(f"collapse_tolerance={self.collapse_tolerance}: must be in (0, 1)")
