"""What a step costs: stock Trainer, with the Fisher and isotropic anchor, and with redirect and replay, side by side.

    python benchmarks/step_cost.py [--quick]

One process, the trainers' own `training_step`, `clip` and optimiser step, on a ResNet-18 of 11.2 M parameters and on the
digits classifier of the demo, interleaved round by round, so that a busy machine is busy for all. Times are medians of the
rounds' ratios to stock Trainer. Memory is measured afterwards: the peak of the allocations that PyTorch's profiler sees in a
step, on top of what was there before it, plus the tensors the trainer holds beside the model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import report
import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_unlearn import UnlearnConfig, UnlearnTrainer
from hf_unlearn.examples.classifier import digits_model


HERE = Path(__file__).parent
WORKLOADS = {  # name: (layers, image side, batch)
    "ResNet-18, 28 × 28, batch 64": ("resnet-18", 28, 64),
    "ResNet-18, 28 × 28, batch 256": ("resnet-18", 28, 256),
    "ResNet-18, 64 × 64, batch 64": ("resnet-18", 64, 64),
    "digits ResNet, 16 × 16, batch 64": ("digits", 16, 64),
}
COMMON = {
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "max_steps": 1,
    "learning_rate": 1e-6,
}
VARIANTS = {
    "stock Trainer": None,
    "ascent, no anchor": {"forget_loss": "ascent"},
    "ascent, isotropic anchor": {"forget_loss": "ascent", "isotropic_weight": 0.1},
    "ascent, Fisher + isotropic anchor": {"forget_loss": "ascent", "isotropic_weight": 0.1, "fisher_weight": 0.14},
    "redirect, Fisher + isotropic anchor": {"isotropic_weight": 0.1, "fisher_weight": 0.14},
    "the same, BatchNorm frozen": {"isotropic_weight": 0.1, "fisher_weight": 0.14, "bn": "frozen"},
    "redirect, both anchors, replay, BatchNorm frozen, guard's check (PBU until 2026-11)": {
        "isotropic_weight": 0.1,
        "fisher_weight": 0.14,
        "replay_weight": 5.0,
        "bn": "frozen",
        "guard": True,
    },
}
BAR = "ascent, Fisher + isotropic anchor"


def model(layers: str):
    if layers == "digits":
        return digits_model()
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
    return ResNetForImageClassification(ResNetConfig(num_channels=1, layer_type="basic", num_labels=10, **sizes))


class Steps:
    """A trainer after one real step, so that its optimiser, reference and anchor exist, taking more steps by hand."""

    def __init__(self, trainer: Trainer, batch: dict):
        self.trainer, self.batch = trainer, batch
        trainer.train()
        trainer.accelerator.gradient_state._set_sync_gradients(True)

    def step(self) -> None:
        trainer = self.trainer
        trainer.training_step(trainer.model, self.batch)
        trainer._clip_grad_norm(trainer.model)
        trainer.optimizer.step()
        trainer.model.zero_grad()

    def held(self) -> int:
        """Bytes of tensors the trainer keeps beside model, gradients and optimiser."""
        trainer = self.trainer
        reference, anchor = getattr(trainer, "reference", None), getattr(trainer, "anchor", None)
        parts = [reference.parameters, reference.buffers] if reference is not None else []
        for part in getattr(anchor, "anchors", [anchor] if anchor is not None else []):
            parts += [part.reference, part.diagonal or {}]
        if (banks := getattr(trainer, "posterior", None)) is not None:
            parts.append({"forget": banks.forget, "keep": banks.keep})
        seen = {tensor.data_ptr(): tensor.nbytes for part in parts for tensor in part.values()}
        return sum(seen.values())

    def peak(self) -> int:
        """Peak of the bytes allocated during a step above its beginning."""
        self.step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.step()
        now = top = 0
        for event in sorted(
            (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"),
            key=lambda e: e.start_ns(),
        ):
            now += event.nbytes()
            top = max(top, now)
        return top


def stepper(settings: dict | None, workload: tuple[str, int, int], folder: str) -> Steps:
    layers, side, batch = workload
    images = torch.randn(batch, 1, side, side, generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"pixel_values": images.numpy(), "label": [3] * batch}).with_format("torch")
    plain = {"pixel_values": images, "labels": torch.full((batch,), 3)}
    common = COMMON | {"per_device_train_batch_size": batch}
    if settings is None:
        return Steps(Trainer(model(layers), TrainingArguments(folder, **common), train_dataset=rows), plain)
    off = {"isotropic_weight": 0.0, "replay_weight": 0.0, "guard": False, "fisher_examples": 2, "bn": "train"}
    trainer = UnlearnTrainer(model(layers), UnlearnConfig(folder, **(common | off | settings)), forget_dataset=rows)
    return Steps(trainer, {"forget": plain})


def measure(steppers: dict[str, Steps], rounds: int) -> dict:
    """Ratios to the first of `steppers`, interleaved."""
    stock = next(iter(steppers))
    for stepper in steppers.values():
        stepper.step()
    times = {name: [] for name in steppers}
    for turn in range(rounds):
        for name in list(steppers) if turn % 2 else list(reversed(steppers)):
            started = time.perf_counter()
            steppers[name].step()
            times[name].append(time.perf_counter() - started)
    size = sum(p.nbytes for p in steppers[stock].trainer.model.parameters())
    plain = steppers[stock].peak()
    rows = {}
    for name, stepper in steppers.items():
        held, peak = stepper.held(), stepper.peak()
        ratios = [t / s for t, s in zip(times[name], times[stock], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "time_ratio": statistics.median(ratios),
            "time_ratio_quartiles": [quartiles[0], quartiles[2]],
            "milliseconds": 1000 * statistics.median(times[name]),
            "extra_memory_in_parameters": (held + peak - plain) / size,
            "memory_ratio": (3 * size + held + peak) / (3 * size + plain),  # parameters and two moments
        }
    return {"parameters": size // 4, "rows": rows}


def compare(name: str, description: str, workloads: dict[str, tuple], steppers: Callable, full: int) -> None:
    """The script of a comparison of `full` rounds: `results/<name>.json`."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds; writes nothing")
    rounds = 4 if parser.parse_args().quick else full
    transformers_logging.set_verbosity_error()
    result = {"rounds": rounds, "threads": torch.get_num_threads(), "workloads": {}}
    for workload, values in workloads.items():
        with tempfile.TemporaryDirectory() as folder:
            result["workloads"][workload] = measure(steppers(*values, folder), rounds)
    print(json.dumps(result, indent=1))
    if rounds == full:
        (HERE / "results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: under two minutes; writes nothing")
    rounds = 4 if parser.parse_args().quick else 40
    transformers_logging.set_verbosity_error()
    result = {"rounds": rounds, "threads": torch.get_num_threads(), "workloads": {}}
    for index, (name, workload) in enumerate(WORKLOADS.items()):
        variants = (
            VARIANTS if index == 0 else {key: VARIANTS[key] for key in ("stock Trainer", BAR, list(VARIANTS)[-1])}
        )
        with tempfile.TemporaryDirectory() as folder:
            steppers = {
                variant: stepper(settings, workload, f"{folder}/{place}")
                for place, (variant, settings) in enumerate(variants.items())
            }
            result["workloads"][name] = measure(steppers, rounds)
    print(report.cost_table(result))
    if rounds == 40:
        file = HERE / "results" / "step_cost.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
