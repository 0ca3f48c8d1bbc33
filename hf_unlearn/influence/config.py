"""Settings of influence trainers, each for a stock config to be mixed into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers import TrainingArguments
from trl import SFTConfig

from ..training.checks import REFUSED, check_fields, check_stock
from ..training.config import settle


RANGES = {
    "> 0": ("trajectory_gigabytes",),
    "≥ 0": ("n_calibration_runs",),
    "≥ 1": ("target_every", "target_batch_size", "target_rank", "last_steps"),
    "in [0, 1)": ("target_window", "burn_in"),
}


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
        layers (`list[str]`, *optional*): names or patterns (`*.q_proj`) of the modules that `in_run` sees, or with a `!` before
            them of those that it does not; default all it can. What is not seen is said at the start and in the report.
        target_rank (`int`, *optional*): approximate the targets' gradients of linear layers by this rank (`in_run`), which makes
            full fine-tuning cheaper to observe.
        target_window (`float`, defaults to 0.2): with `propagated`, the target is its mean loss over this last share of the steps:
            much less noisy than the loss of the last step alone. σ is that of the last step.
        burn_in (`float`, defaults to 0.1): share of the steps, from the first, whose observations do not count. The first
            steps say little but noise of what is left in the end; 0 counts all.
        last_steps (`int`, *optional*): with `propagated`, keep and sweep this many last steps only. σ is then that of these steps, and μ larger than that of the
            whole run.
        trajectory_gigabytes (`float`, defaults to 2): with `propagated`, room for states of the run on disk; what does not fit is
            computed again. Batches that take more than this (or 1 GB) are refused.
        n_calibration_runs (`int`, defaults to 0): further trainings from `model_init`, with other seeds, which measure σ directly; of
            `in_run` and four or more every second one leaves out examples, to measure how much of what was seen is there in the end.
            Without them `in_run` has no unit.
        id_column (`str`, defaults to `"id"`): column that identifies training examples; the row number where there is none.

    Raises:
        ValueError: a value out of its range.
    """

    refused: ClassVar[dict[str, str]] = REFUSED | {  # stock fields, and why
        "auto_find_batch_size": "steps that are taken again would count twice; set per_device_train_batch_size",
        "label_smoothing_factor": "not supported; the loss must be the mean of the examples' own",
        "torch_compile": "a compiled model runs around the layers that are looked at; set it to False",
        "torch_compile_backend": "a compiled model runs around the layers that are looked at; leave it out",
        "torch_compile_mode": "a compiled model runs around the layers that are looked at; leave it out",
        "use_liger_kernel": "its kernels run around the layers that are looked at; set it to False",
    }

    observation: Literal["in_run", "propagated"] | None = None
    preconditioned: bool = False
    target_every: int = 10
    target_batch_size: int | None = 8
    layers: list[str] | None = None
    target_rank: int | None = None
    target_window: float = 0.2
    burn_in: float = 0.1
    last_steps: int | None = None
    trajectory_gigabytes: float = 2.0
    n_calibration_runs: int = 0
    id_column: str = "id"

    def __post_init__(self):
        check_stock(self, self.refused)
        settle(self)
        super().__post_init__()
        check_fields(self, RANGES)
        if self.n_calibration_runs == 1:
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
