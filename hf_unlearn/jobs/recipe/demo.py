"""The keys of `hf-unlearn demo`."""

from __future__ import annotations

from dataclasses import dataclass

from ...training.checks import SEEDS, check_number


@dataclass
class DemoJob:
    """Settings of `hf-unlearn demo`.

    Args:
        output_dir (`str`, defaults to `"demo"`): folder for the models, the audit and the page that shows them; new or empty.
        forgotten (`int`, defaults to 3): the digit to forget, 0 to 9; another one gets the wrong labels.
        seed (`int`, defaults to 0): of weights, orders, wrong labels and latents.

    Raises:
        ValueError: no such digit, no folder, or no seed.
    """

    output_dir: str = "demo"
    forgotten: int = 3
    seed: int = 0

    def __post_init__(self):
        if not self.output_dir.strip():
            raise ValueError(f"output_dir={self.output_dir!r}: is empty; name a folder")
        check_number("seed", self.seed, SEEDS)
        if self.forgotten not in range(10):
            raise ValueError(f"forgotten: {self.forgotten} is no digit; choose one of 0 to 9")
