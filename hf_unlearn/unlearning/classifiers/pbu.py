"""PBU: partially-blinded unlearning of a class from a classifier (arXiv 2403.16246, AAAI 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import UnlearnConfig
from ..trainer import UnlearnTrainer


LOOK = 20  # steps between two looks of the guard, where an epoch has fewer


@dataclass
class PBUConfig(UnlearnConfig):
    __doc__ = rf"""Configuration of [`PBUTrainer`]: [`UnlearnConfig`], with defaults that forget a class in tens of steps and do
    not collapse when there are hundreds.

    The paper's loss is `forget_weight · (−CE) + fisher_weight · Σ Fᵢ(θᵢ−θ*ᵢ)² + isotropic_weight · ‖θ−θ*‖²`, that is α, β
    and γ. −CE has no lower bound, so by default the forget loss is `sever`: DELETE's (arXiv 2503.23751), features that no longer
    point at the class, and a row of the head that is closed in the end; with data-free replay beside it.
    [`PBUConfig.paper`] is the paper's objective and schedule, with every safety off.

    The defaults were chosen on the validation split of scikit-learn's digits (docs/methods/pbu.md).

    > Of PBU
        guard_steps (`int`, *optional*): default: once per epoch, but no more often than every {LOOK} steps.
    """

    learning_rate: float = 2e-4
    lr_scheduler_type: str = "constant"
    per_device_train_batch_size: int = 32
    num_train_epochs: float = 10.0
    save_strategy: str = "no"
    logging_steps: float = 10

    @classmethod
    def paper(cls, output_dir: str, **overrides: Any) -> PBUConfig:
        """The authors' objective and schedule: ascent, α 1, β 0.14, γ 5.6 (the ratios of their MNIST settings; Adam is nearly
        scale-free), the Fisher of all forget examples, Adam at 1e-4, batch 64, BatchNorm in train mode, no clipping, no
        guard, no replay. Nothing bounds it: in the authors' notebook it collapses between epochs 4 and 5.
        """
        preset = {
            "forget_loss": "ascent",
            "forget_weight": 1.0,
            "fisher_weight": 0.14,
            "isotropic_weight": 5.6,
            "fisher_examples": None,
            "replay_weight": 0.0,
            "bn": "train",
            "guard": False,
            "learning_rate": 1e-4,
            "per_device_train_batch_size": 64,
            "max_grad_norm": 0.0,
            "num_train_epochs": 3.0,
        }
        return cls(output_dir=output_dir, **(preset | overrides))


class PBUTrainer(UnlearnTrainer):
    """Makes a classifier forget a class from the examples of that class alone.

    Arguments as for [`UnlearnTrainer`], `args` a [`PBUConfig`].

    ```python
    trainer = PBUTrainer("me/digits", args=PBUConfig(output_dir="digits-without-3"), forget_dataset=threes)
    trainer.train()
    trainer.save_model()
    ```
    """

    _method = "pbu"
    _title = "Partially-blinded unlearning"
    _paper = "2403.16246"
    _config_class = PBUConfig

    @property
    def guard_steps(self) -> int | None:
        in_epoch = self.state.max_steps / max(self.state.num_train_epochs, 1)
        return self.args.guard_steps or (LOOK if in_epoch < LOOK else None)
