"""What a step of unlearning a language model costs: stock SFTTrainer on as many rows, and ours and peers.

    python benchmarks/language_cost.py [--quick]

The same rows are forgotten in every step, as many as our defaults take, with others at hand or without; trainers' own steps, interleaved
round by round, medians of the rounds' ratios to stock training on the rows to forget; memory as in step_cost.py, and relative to stock
training's parameters, moments and peak.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from datasets import concatenate_datasets, disable_progress_bars
from language_attacks import QUIET
from language_unlearning import KEPT, OURS, PLAIN, ROWS, TUNED_ON, data_of, folder_of, loaded
from step_cost import Steps, compare
from transformers import AutoTokenizer, Trainer
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from hf_unlearn import UnlearnSFTConfig, UnlearnSFTTrainer
from hf_unlearn.examples.facts import FactsRecipe, kinds


WORKLOADS = {"Llama of 5 M": (TUNED_ON,)}  # which knows the rows, or there would be nothing to forget
COMMON = QUIET | {"per_device_train_batch_size": ROWS, "max_steps": 1, "learning_rate": 1e-6}
VARIANTS = {  # settings beside COMMON, and whether retained rows are at hand
    "`ascent` + retain": (PLAIN | {"forget_loss": "ascent"}, True),
    "`npo` + retain": (PLAIN | {"forget_loss": "npo"}, True),
    **{f"**`{name}`, our defaults, + retain**": (settings, True) for name, settings in OURS.items()},
    **{f"**`{name}`, our defaults**": (settings, False) for name, settings in OURS.items()},
}


def alive() -> int:
    """Bytes of all tensors that Python holds, but for those that a run keeps in files and reads from there when they are asked for."""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "/_private/" in line]
    mapped = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return sum(
        {
            tensor.data_ptr(): tensor.nbytes
            for tensor in tensors
            if not any(begin <= tensor.data_ptr() < end for begin, end in mapped)
        }.values()
    )


class TextSteps(Steps):
    """Steps on the whole of what a trainer was given, which `make` makes."""

    def __init__(self, make: Callable[[], Trainer]):
        before = alive()
        trainer = make()
        trainer.pop_callback(PrinterCallback)
        super().__init__(trainer, None)
        self.batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        self.step()
        parameters = sum(parameter.nbytes for parameter in trainer.model.parameters())
        self._held = alive() - before - 3 * parameters  # themselves and two moments

    def held(self) -> int:
        return self._held


def steppers(recipe: FactsRecipe, folder: str) -> dict[str, Steps]:
    disable_progress_bars()
    data, original = data_of(recipe), folder_of(recipe)
    tokenizer = AutoTokenizer.from_pretrained(original)
    forget, retain = (
        data[name]
        .select(range(0, len(data[name]), len(kinds()) + 1)[: 2 * ROWS])
        .select_columns(["id", "prompt", "completion"])
        for name, number in (("forget", ROWS), ("retain", ROWS * KEPT))
    )

    def stock(rows: int) -> Trainer:
        args = SFTConfig(f"{folder}/{rows}", **(COMMON | {"per_device_train_batch_size": rows}))
        taught = concatenate_datasets([forget, retain]).select(range(rows)).remove_columns("id")
        return SFTTrainer(loaded(original), args, train_dataset=taught, processing_class=tokenizer)

    def ours(name: str, settings: dict, kept: bool) -> Trainer:
        args = UnlearnSFTConfig(f"{folder}/{len(name)}{kept}", **(settings | COMMON))
        return UnlearnSFTTrainer(
            loaded(original), args, forget_dataset=forget, retain_dataset=retain if kept else None,
            processing_class=tokenizer,
        )  # fmt: skip

    makers = {
        "SFTTrainer, rows to forget": partial(stock, ROWS),
        "SFTTrainer, all rows": partial(stock, ROWS * (1 + KEPT)),
    }
    makers |= {name: partial(ours, name, *variant) for name, variant in VARIANTS.items()}
    return {name: TextSteps(make) for name, make in makers.items()}


if __name__ == "__main__":
    compare("language_cost", __doc__, WORKLOADS, steppers, 30)
