"""Settings of influence trainers, each for a stock config to be mixed into."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments
from trl import SFTConfig


@dataclass
class FINEArguments:
    """What a run observes of its examples, and how μ follows from it.

    Args:
        observation (`"in_run"` or `"propagated"`, *optional*): `in_run` sees how much each step moves the target's loss then:
            one product in each layer while training. `propagated` carries the target's gradient back through the finished run
            (one Hessian-vector product a step and target, for small models and adapters), and so sees what is left of it in
            the end: closer to retraining, with a σ of its own. Default: `propagated`; `in_run` for language models,
            for `target="self"` and with several processes.
        preconditioned (`bool`, defaults to `False`): with `in_run` under Adam, fold 1/(√v̂+ε) into the target's gradient. It is
            the change of the loss to first order, and ranked worse than the plain product when judged by retraining.
        target_every (`int`, defaults to 10): steps between two looks at the targets' gradients (in the sweep at most a quarter of
            its window).
        target_batch_size (`int`, *optional*, defaults to 8): examples of a target in one look while training (`in_run`), drawn
            anew each time; None takes all. The sweep takes all.
        layers (`list[str]`, *optional*): names or patterns (`*.q_proj`) of the modules that `in_run` sees; default all it can.
        target_rank (`int`, *optional*): approximate the targets' gradients of linear layers by this rank (`in_run`), which makes
            full fine-tuning cheaper to observe.
        target_window (`float`, defaults to 0.2): with `propagated`, the target is its mean loss over this last share of the steps:
            much less noisy than the loss of the last step alone. σ is that of the last step.
        burn_in (`float`, defaults to 0.1): share of the steps, from the first, whose observations do not count. The first
            steps say little but noise of what is left in the end; 0 counts all.
        last_steps (`int`, *optional*): with `propagated`, keep and sweep this many last steps only. σ is then that of these steps, taken
            for independent draws where they are less than about two epochs, and μ larger than that of the whole run.
        trajectory_gigabytes (`float`, defaults to 2): with `propagated`, room for states of the run on disk; what does not fit is
            computed again. Batches that take more than this (or 1 GB) are refused.
        n_calibration_runs (`int`, defaults to 0): further trainings from `model_init`, with other seeds, which measure σ directly.
        id_column (`str`, defaults to `"id"`): column that identifies training examples; the row number where there is none.

    Raises:
        ValueError: a value out of its range.
    """

    observation: Literal["in_run", "propagated"] | None = field(
        default=None, metadata={"help": "What is observed: in_run (cheap) or propagated (closer to retraining)."}
    )
    preconditioned: bool = field(
        default=False, metadata={"help": "in_run: fold Adam's 1/(sqrt(v)+eps) into the target."}
    )
    target_every: int = field(default=10, metadata={"help": "Steps between two looks at the targets."})
    target_batch_size: int | None = field(
        default=8, metadata={"help": "in_run: examples of a target in one look; null: all."}
    )
    layers: list[str] | None = field(default=None, metadata={"help": "in_run: names or patterns of modules to see."})
    target_rank: int | None = field(default=None, metadata={"help": "in_run: rank of the targets' gradients."})
    target_window: float = field(
        default=0.2, metadata={"help": "propagated: the target is its mean loss over this last share of steps."}
    )
    burn_in: float = field(default=0.1, metadata={"help": "Share of the steps, from the first, that does not count."})
    last_steps: int | None = field(default=None, metadata={"help": "propagated: keep and sweep the last steps only."})
    trajectory_gigabytes: float = field(
        default=2.0, metadata={"help": "propagated: room on disk for states; the rest is computed again."}
    )
    n_calibration_runs: int = field(default=0, metadata={"help": "Further trainings that measure sigma directly."})
    id_column: str = field(default="id", metadata={"help": "Column that identifies training examples."})

    def __post_init__(self):
        super().__post_init__()
        if self.observation not in (None, "in_run", "propagated"):
            raise ValueError(f"observation: {self.observation!r} is not 'in_run' or 'propagated'")
        for name in ("target_every", "target_batch_size", "target_rank", "last_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is below 1")
        for name in ("target_window", "burn_in"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not a share from 0 to below 1")
        if self.trajectory_gigabytes <= 0:
            raise ValueError(f"trajectory_gigabytes: {self.trajectory_gigabytes} is not above 0")
        if self.n_calibration_runs < 0 or self.n_calibration_runs == 1:
            raise ValueError(
                f"n_calibration_runs: {self.n_calibration_runs} runs have no spread; use 0, or 2 and more"
            )


@dataclass
class InfluenceConfig(FINEArguments, TrainingArguments):
    __doc__ = (
        "[`~transformers.TrainingArguments`] and what an influence trainer adds.\n"
        + FINEArguments.__doc__.split("\n", 1)[1]
    )


@dataclass
class FINEConfig(FINEArguments, SFTConfig):
    __doc__ = "[`~trl.SFTConfig`] and what an influence trainer adds.\n" + FINEArguments.__doc__.split("\n", 1)[1]
