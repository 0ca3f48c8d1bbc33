"""How time and memory grow with the rows of a data set, the parameters of a model, the targets of influence and the concepts of a filter: × 1, × 4, × 16.

    python benchmarks/growth.py [--only PART …] [--repeats 3] [--quick]

One process, one thread. Time is that of the processor (`process_time`), which other programs on the machine change less than that of the clock,
and the least of repeats, in which the three sizes take turns. Memory is the most that the process held (VmHWM) above what it held
before, and again the least; glibc gives back at once what is freed (MALLOC_MMAP_THRESHOLD_). Exponents are slopes of the logarithms: over all three
sizes, and between the two larger ones, where what is constant weighs less. `results/growth.json`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import gpu
import numpy as np
import torch
from rows import QUIET, high_water, keep, rounded
from scaling_report import slope_of
from shapes import SHORT, adapter, llama, sizes, text_to_image, words
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from hf_unlearn import (
    ConceptRedirection,
    FASTFitter,
    FINEConfig,
    FINETrainer,
    InfluenceConfig,
    InfluenceIndex,
    UnlearnConfig,
    UnlearnSFTConfig,
    UnlearnSFTTrainer,
    UnlearnTrainer,
)
from hf_unlearn.examples.classifier import digits_model
from hf_unlearn.filtering.fitting import forms
from hf_unlearn.filtering.fitting.background import Moments
from hf_unlearn.filtering.scores import ScoreBank
from hf_unlearn.influence import index as indexing
from hf_unlearn.influence.report.writer import Recorder
from hf_unlearn.metrics.classification import Accuracy
from hf_unlearn.metrics.features import features_of
from hf_unlearn.metrics.generation import frechet_distance
from hf_unlearn.unlearning.diffusion.wordings import THINGS


RESULTS = Path(__file__).parent / "results" / "growth.json"
TIMES = (1, 4, 16)
# Of a training run, those that are not timed, and the one whose operations are counted. f-INE looks at the loss, by two passes more, in steps 0, 1, 2, 4
# and the last, so that only step 3 is a step as most of them are.
STEPS, FIRST, COUNTED = 5, 2, 3
FORGET, KEPT = 2, 2
COMMON = QUIET | {"use_cpu": True, "bf16": False, "learning_rate": 1e-6, "log_level": "error", "seed": 0}
MARK = "MALLOC_MMAP_THRESHOLD_"


class Took(TrainerCallback):
    """Processor seconds of the steps, and the operations of one."""

    def __init__(self):
        self.begins, self.seconds, self.counter = 0.0, [], FlopCounterMode(display=False)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == COUNTED:
            self.counter.__enter__()
        self.begins = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.begins)
        if state.global_step == COUNTED + 1:
            self.counter.__exit__(None, None, None)


def trained(trainer: Any) -> dict[str, float]:
    took = Took()
    trainer.add_callback(took)
    trainer.train()
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return {
        "seconds": min(took.seconds[FIRST:-1]),
        "operations": took.counter.get_total_flops(),
        "parameters": parameters,
    }


# Rows of a data set


def records(rows: int, folder: str) -> None:
    """What f-INE observes, in shards of 20,000."""
    recorder = Recorder(Path(folder, "records"), {"targets": ["one"]}, range(10_000), rows_per_shard=20_000)
    for step in range(rows // 1000):
        recorder.add(step, np.arange(1000), np.ones(1000), np.ones((1000, 1), dtype=np.float32))
    recorder.flush()


def index(rows: int, folder: str) -> None:
    """Projected gradients of a classifier, in shards of 1 MB: those of 64 MB would hide whether memory grows."""
    indexing.SHARD_BYTES = 2**20
    model = digits_model().eval()
    args = InfluenceConfig(folder, use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False)
    InfluenceIndex.build(model, digits(rows), f"{folder}/index", curvature_examples=64, args=args)


def digits(rows: int, classes: int = 10) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(rows, 1, 16, 16, generator=generator)
    return datasets.Dataset.from_dict(
        {"pixel_values": images.numpy(), "label": [row % classes for row in range(rows)]}
    ).with_format("torch")


def fitter(rows: int, folder: str) -> None:
    """Embeddings of what nobody marked, as they come."""
    generator, fit = torch.Generator().manual_seed(0), FASTFitter()
    fit.update(undesired=torch.randn(20, 256, generator=generator) + 1)
    for _ in range(rows // 1000):
        fit.update(unmarked=torch.randn(1000, 256, generator=generator))
    fit.fit(max_prevalence=0.5, rate=0.3)


def accuracy(rows: int, folder: str) -> None:
    """`compute_metrics` of an evaluation, batch by batch."""
    metric, generator = Accuracy(), torch.Generator().manual_seed(0)
    for batch in range(rows // 1000):
        given = torch.randn(1000, 100, generator=generator), torch.arange(1000) % 100
        metric(_Evaluation(*given), compute_result=batch == rows // 1000 - 1)


class _Evaluation:
    def __init__(self, predictions: torch.Tensor, labels: torch.Tensor):
        self.predictions, self.label_ids = predictions, labels


def frechet(rows: int, folder: str) -> None:
    """Features of images and their Fréchet distance."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(rows, 1, 8, 8, generator=generator) * 2 - 1
    found = features_of(images, lambda batch: batch.flatten(1), name="pixels")
    frechet_distance(found, found)


def unlearnt(rows: int, folder: str) -> dict[str, float]:
    """A step of PBU."""
    args = UnlearnConfig(
        f"{folder}/run", **COMMON, max_steps=STEPS, per_device_train_batch_size=16, guard=False, fisher_examples=16
    )
    return trained(UnlearnTrainer(digits_model(), args, forget_dataset=digits(rows, classes=1)))


# Parameters of a model, targets


def texts(number: int) -> datasets.Dataset:
    said = [[f"w{token}" for token in row] for row in np.random.default_rng(0).integers(3, 1024, (number, SHORT - 1))]
    rows = {"prompt": [" ".join(row[:8]) for row in said], "completion": [" " + " ".join(row[8:]) for row in said]}
    return datasets.Dataset.from_dict(rows)


def language(times: int, folder: str, name: str, lora: bool = False, targets: int = 1) -> dict[str, float]:
    """A step of training a language model."""
    size, batch = sizes(times), FORGET * (1 + KEPT) if "6" in name else FORGET
    rows = texts(6 * STEPS + 4)
    common = COMMON | {
        "output_dir": f"{folder}/run",
        "max_steps": STEPS,
        "gradient_checkpointing": False,
        "max_length": SHORT,
    }
    common["per_device_train_batch_size"] = batch if name.startswith("plain") else FORGET
    given = {
        "model": llama(size),
        "processing_class": words(size["vocab_size"]),
        "peft_config": adapter(8) if lora else None,
    }
    if name.startswith("plain"):
        return trained(SFTTrainer(args=SFTConfig(**common), train_dataset=rows, **given))
    if name.startswith("f-INE"):
        args = FINEConfig(**common, target_every=10**6, target_batch_size=4, observation="in_run")
        looked = {f"target {place}": rows.select(range(4)) for place in range(targets)}
        return trained(FINETrainer(args=args, train_dataset=rows, target_dataset=looked, **given))
    forget, retain = rows.select(range(2 * STEPS)), rows.select(range(2 * STEPS, 6 * STEPS))
    loss = {"forget_loss": name.split(",")[0], "guard": False, "retain_per_forget": KEPT}
    loss |= {"own_samples": 0} if loss["forget_loss"] == "redirect" else {"replay_weight": 0.0}
    return trained(
        UnlearnSFTTrainer(
            args=UnlearnSFTConfig(**common, **loss), forget_dataset=forget, retain_dataset=retain, **given
        )
    )


# Passes of a denoiser


def denoised(times: int, folder: str, name: str, weights: str) -> dict[str, float]:
    """A step of VDU, or of plain training, in the shape of Stable Diffusion but tiny."""
    return trained(gpu.denoising(gpu.Machine(True, folder), "sd15", name, weights))


def products(times: int, folder: str) -> dict[str, float]:
    """The most that this machine's processor does: operations of a product in float32, bytes of a copy, a second."""
    a, long = torch.randn(1024, 1024), torch.empty(2**27, dtype=torch.uint8)
    other = torch.zeros_like(long)

    def least(function: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(5):
            begun = time.process_time()
            function()
            seconds.append(time.process_time() - begun)
        return min(seconds)

    return {
        "operations_a_second": 2 * 1024**3 / least(lambda: a @ a),
        "bytes_a_second": 2 * long.nbytes / least(lambda: other.copy_(long)),
    }


# Concepts


def redirected(concepts: int, folder: str, made: dict = {}) -> dict[str, float]:  # noqa: B006
    """Words lead elsewhere in a text-to-image pipeline, in closed form."""
    pipeline = made.setdefault("pipeline", text_to_image("sd15", tiny=True))
    names = [word for kind in THINGS.values() for word in kind.split()][:concepts]
    begun = time.process_time()
    ConceptRedirection.of(pipeline, names, anchor="thing", keep=["a house", "a red car", "a tree"])
    return {"seconds": time.process_time() - begun}


def scored(concepts: int, folder: str) -> dict[str, float]:
    """10,000 embeddings of 512 numbers, by so many concepts."""
    generator = torch.Generator().manual_seed(0)
    embeddings, pool = torch.randn(10_000, 512, generator=generator), torch.randn(2000, 512, generator=generator)
    moments = Moments(512)
    moments.update(pool.double().numpy())
    marks = (torch.randn(20, 512, generator=generator).double().numpy() + 0.5 for _ in range(concepts))
    basis = forms.basis_of(moments, 64)
    bank = ScoreBank.of([forms.quadratic(rows, basis) for rows in marks])
    begun = time.process_time()
    bank(embeddings)
    return {"seconds": time.process_time() - begun}


PARTS: dict[tuple[str, str], tuple[int, Callable[[int, str], dict[str, float] | None]]] = {  # (along, part): (× 1 is, what is done)
    ("rows", "f-INE: records"): (50_000, records),
    ("rows", "influence: index"): (128, index),
    ("rows", "FAST: fitter"): (16_000, fitter),
    ("rows", "metric: accuracy"): (10_000, accuracy),
    ("rows", "metric: Fréchet distance"): (4_000, frechet),
    ("rows", "PBU: a step"): (256, unlearnt),
    ("parameters", "plain, 2 texts"): (1, partial(language, name="plain, 2 texts")),
    ("parameters", "plain, 6 texts"): (1, partial(language, name="plain, 6 texts")),
    ("parameters", "npo, 2 + 4 texts"): (1, partial(language, name="npo, 2 + 4 texts")),
    ("parameters", "redirect, 2 + 4 texts"): (1, partial(language, name="redirect, 2 + 4 texts")),
    ("parameters", "f-INE, 2 texts"): (1, partial(language, name="f-INE, 2 texts")),
    ("targets", "f-INE, all weights: a step"): (1, lambda n, folder: language(1, folder, "f-INE, 2 texts", targets=n)),
    ("targets", "f-INE, LoRA: a step"): (1, lambda n, folder: language(1, folder, "f-INE, 2 texts", lora=True, targets=n)),
    ("once", "products"): (1, products),
    **{
        ("once", f"{name}, {weights}"): (1, partial(denoised, name=name, weights=weights))
        for name in ("plain, 1 batch", "VDU")
        for weights in ("all", "cross_attention")
    },
    ("concepts", "redirect in closed form"): (1, redirected),
    ("concepts", "FAST: scoring"): (1, scored),
}  # fmt: skip


def measured(work: Callable[[int, str], dict[str, float] | None], size: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        before, begun = high_water(begin=True), time.process_time()
        found = work(size, folder) or {}
        took = time.process_time() - begun
        return {"seconds": took} | found | {"mb": high_water() - before}


def rows_of(along: str, part: str, repeats: int, times: tuple[int, ...] = TIMES) -> list[dict[str, Any]]:
    base, work = PARTS[along, part]
    measured(work, base)  # imports, pools of threads and kernels are made once
    found: dict[int, list[dict[str, float]]] = {each: [] for each in times}
    for repeat in range(repeats):
        for each in times if repeat % 2 else reversed(times):
            found[each].append(measured(work, base * each))
    least = {each: {name: min(row[name] for row in rows) for name in rows[0]} for each, rows in found.items()}
    return [
        rounded({"along": along, "part": part, "times": each, "size": base * each, **row})
        for each, row in least.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="× 1 alone, of a few parts, once; writes nothing")
    parser.add_argument("--only", nargs="+", default=[], help="parts whose names begin so")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    if MARK not in os.environ:  # glibc reads it at its beginning
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {MARK: "65536", "OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("hf_unlearn").setLevel(logging.ERROR)
    for along, part in PARTS:
        if given.only and not part.startswith(tuple(given.only)):
            continue
        if given.quick and along not in ("rows", "concepts"):
            continue
        once = given.quick or along == "once"
        rows = rows_of(along, part, 1 if once else given.repeats, (1,) if once else TIMES)
        print(*map(json.dumps, rows), sep="\n", flush=True)
        if len(rows) == len(TIMES):
            of = {name: slope_of([row[name] for row in rows], list(TIMES)) for name in ("seconds", "mb")}
            print(f"{part}: exponents along {along}: time {of['seconds']:.2f}, memory {of['mb']:.2f}", flush=True)
        if not given.quick:
            keep(RESULTS, rows, ("along", "part", "times"), torch=torch.__version__)


if __name__ == "__main__":
    main()
