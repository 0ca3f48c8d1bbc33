"""What finding, forgetting and filtering cost at the size of real models, on one GPU, beside plain training: time and memory, in less than eight minutes.

    python benchmarks/gpu.py [--minutes 8] [--only PART …] [--out FILE]
    python benchmarks/gpu.py --tiny --out FILE

Llama 3.1 8B with a LoRA of rank 128 in bf16 on 2,048 tokens; Stable Diffusion 1.5 and SDXL, all weights and cross-attention; CLIP ViT-L/14 as a
filter's encoder. Weights are random and tokenizers are made here: nothing is downloaded. Each row is a run of a trainer of its own; a step's time is
the median over its later steps with all that belongs to them, memory the most that PyTorch held in these and in the whole run. What was measured is
written row by row (results/gpu.json): a row that fails says why, and the next one goes on; what no longer fits into the time is left out and said.
`--tiny`: the same rows with tiny models on the CPU, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from diffusion_cost import PlainTrainer
from PIL import Image
from rows import QUIET, high_water, keep, rounded
from shapes import LLAMA_8B, RANK, TINY, TOKENS, adapter, llama, text_to_image, words
from torch import Tensor
from torch.utils.data import default_collate
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from hf_unlearn import (
    ConceptRedirection,
    FASTFitter,
    FilterEncoder,
    FINEConfig,
    FINETrainer,
    UnlearnSFTConfig,
    UnlearnSFTTrainer,
    VDUConfig,
    VDUTrainer,
)
from hf_unlearn.training.noise import NoiseSchedule
from hf_unlearn.unlearning.diffusion.architecture import Architecture
from hf_unlearn.unlearning.diffusion.denoiser import choose_trainable
from hf_unlearn.unlearning.diffusion.encoded import EncodedImages, encode_prompts
from hf_unlearn.unlearning.diffusion.pipelines import architecture_of


RESULTS = Path(__file__).parent / "results" / "gpu.json"
KEPT, TARGETS = 2, 4  # rows to keep beside each that is forgotten, the default; rows of a target
FIRST = 2  # steps that are not timed: the optimiser is made, kernels are chosen
EVERY = 4  # steps between two looks at a target
PROMPTS, NEUTRAL, OTHERS = "a photo of a cat", "a photo of an animal", ["a house", "a red car", "a tree", "a street"]
IMAGES = {"sd15": 4, "sdxl": 2}  # of a batch; one of a tiny model
MARKS = 20
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "projection_dim": 16,
}


@dataclass(frozen=True)
class Machine:
    """Where, and how much: a GPU, or the CPU with tiny models."""

    tiny: bool
    folder: str

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.tiny else "cuda")

    @property
    def steps(self) -> int:
        return FIRST + (2 if self.tiny else 3 * EVERY)

    @property
    def common(self) -> dict[str, Any]:
        return QUIET | {
            "log_level": "error",
            "use_cpu": self.tiny,
            "bf16": not self.tiny,
            "max_steps": self.steps,
            "learning_rate": 1e-6,
        }

    def now(self) -> float:
        if not self.tiny:
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(self) -> None:
        """Look at memory from here."""
        if self.tiny:
            high_water(begin=True)
        else:
            torch.cuda.reset_peak_memory_stats()

    def most(self) -> float:
        """Since then, in MB."""
        return high_water() if self.tiny else torch.cuda.max_memory_allocated() / 2**20

    def empty(self) -> None:
        gc.collect()
        if not self.tiny:
            torch.cuda.empty_cache()


class Steps(TrainerCallback):
    """When each step ended, and the most memory before the first that is timed and after it."""

    def __init__(self, machine: Machine):
        self.machine, self.ends = machine, []
        self.before = self.timed = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(self.machine.now())
        if len(self.ends) == FIRST:
            self.before = self.machine.most()
            self.machine.begin()
        elif len(self.ends) == args.max_steps:
            self.timed = self.machine.most()


def run(make: Callable[[], Any], machine: Machine, examples: int) -> dict[str, Any]:
    """A training run's row.

    Args:
        make: the trainer.
        machine ([`Machine`]): where.
        examples (`int`): texts or images that are trained on in a step.
    """
    machine.begin()
    begun = machine.now()
    trainer, steps = make(), Steps(machine)
    trainer.add_callback(steps)
    sizes = [(p.numel(), p.requires_grad) for p in trainer.model.parameters()]
    trainer.train()
    seconds = [after - before for before, after in zip(steps.ends[FIRST - 1 :], steps.ends[FIRST:], strict=False)]
    return {
        "examples": examples,
        "parameters": sum(number for number, _ in sizes),
        "trained": sum(number for number, trained in sizes if trained),
        "seconds": statistics.median(seconds),
        "mean_seconds": statistics.fmean(seconds),  # of f-INE: with its looks
        "step_mb": steps.timed,
        "run_mb": max(machine.most(), steps.before),  # with what comes before the first step and after the last
        "before_seconds": steps.ends[0] - begun,
    }


# What the machine can do


def products(machine: Machine) -> dict[str, Any]:
    """Operations a second of a large product in bf16, and bytes a second that are moved."""
    size = 256 if machine.tiny else 8192
    a = torch.randn(size, size, device=machine.device, dtype=torch.bfloat16)
    long = torch.empty(2**20 if machine.tiny else 2**31, device=machine.device, dtype=torch.uint8)
    other = torch.empty_like(long)

    def least(function: Callable[[], Any]) -> float:
        times = []
        for _ in range(10):
            begun = machine.now()
            function()
            times.append(machine.now() - begun)
        return min(times)

    moved = 2 * long.nbytes / least(lambda: other.copy_(long))
    name = "CPU" if machine.tiny else torch.cuda.get_device_name()
    return {
        "device": name,
        "operations": 2 * size**3 / least(lambda: a @ a),
        "moved": moved,
        "torch": torch.__version__,
    }


# A language model


def texts(machine: Machine, number: int) -> datasets.Dataset:
    """Questions and answers of random words, as long as is measured; no two alike."""
    vocabulary = (TINY if machine.tiny else LLAMA_8B)["vocab_size"]
    tokens = 32 if machine.tiny else TOKENS
    drawn = np.random.default_rng(0).integers(3, vocabulary, (number, tokens - 1))  # an end is added to each
    said = [[f"w{token}" for token in row] for row in drawn]
    asked = tokens // 8
    rows = {
        "prompt": [" ".join(row[:asked]) for row in said],
        "completion": [" " + " ".join(row[asked:]) for row in said],
    }
    return datasets.Dataset.from_dict(rows)


def of_language(machine: Machine, name: str) -> dict[str, Any]:
    sizes, rank = (TINY, 4) if machine.tiny else (LLAMA_8B, RANK)
    tokenizer, tokens = words(sizes["vocab_size"]), 32 if machine.tiny else TOKENS
    common = machine.common | {
        "output_dir": f"{machine.folder}/run", "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
        "gradient_checkpointing": True, "max_length": tokens,
    }  # fmt: skip
    steps, examples = machine.steps, 1
    rows = texts(machine, 64)
    forget, retain, targets = (
        rows.select(range(steps)),
        rows.select(range(steps, 3 * steps)),
        rows.select(range(60, 64)),
    )

    def make() -> Any:
        dtype = torch.float32 if machine.tiny else torch.bfloat16
        given = {
            "model": llama(sizes, dtype, machine.device),
            "processing_class": tokenizer,
            "peft_config": adapter(rank),
        }
        if name.startswith("plain"):
            args = SFTConfig(**(common | {"per_device_train_batch_size": examples}))
            return SFTTrainer(args=args, train_dataset=rows.select(range(examples * steps)), **given)
        if name.startswith("f-INE"):
            looked = {"target_every": EVERY, "target_batch_size": TARGETS, "observation": "in_run"}
            args = FINEConfig(**(common | looked))
            return FINETrainer(args=args, train_dataset=forget, target_dataset={"target": targets}, **given)
        loss = {"forget_loss": name.split()[-1], "guard": False, "retain_per_forget": KEPT}
        loss |= {"own_samples": 0} if "redirect" in name else {"replay_weight": 0.0}
        return UnlearnSFTTrainer(
            args=UnlearnSFTConfig(**(common | loss)), forget_dataset=forget, retain_dataset=retain, **given
        )

    if name == "plain, 3 texts" or name.startswith("UnlearnSFT"):
        examples = 1 + KEPT
    return run(make, machine, examples) | {"tokens": tokens}


# Text-to-image


class PlainDenoising(PlainTrainer):
    """The usual training of a text-to-image denoiser: one forward pass, mean squared error of the noise."""

    architecture: Architecture

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
        clean = inputs["latents"]
        timesteps = torch.randint(len(self.schedule), (len(clean),), device=clean.device)
        noise = torch.randn_like(clean)
        answer = self.architecture.call(
            model, self.schedule.add_noise(clean, noise, timesteps), timesteps, inputs["conditioning"]
        )
        return (answer.float() - noise).square().mean()


def latents(pipeline: Any, number: int, prompts: list[str], device: torch.device) -> EncodedImages:
    """Random ones, as many as are asked for, with the prompts in turn."""
    side, generator = pipeline.unet.config.sample_size, torch.Generator().manual_seed(0)
    asked = [prompts[row % len(prompts)] for row in range(number)]
    told = encode_prompts(asked, pipeline, device=device)
    return EncodedImages(torch.randn(number, 4, side, side, generator=generator), None, *told, sorted(set(asked)))


def denoising(machine: Machine, shape: str, name: str, trained: str) -> Any:
    """The trainer of a row."""
    batch = images_of(machine, shape)
    many = name == "plain, 2 batches"
    common = machine.common | {
        "output_dir": f"{machine.folder}/run",
        "per_device_train_batch_size": batch * (1 + many),
    }
    pipeline = text_to_image(shape, machine.tiny, machine.device)
    forget, replay = (latents(pipeline, 4 * batch, prompts, machine.device) for prompts in ([PROMPTS], OTHERS))
    if name == "VDU":
        args = VDUConfig(
            **common, guard=False, grid_images=0, trainable=[trained], closed_form=False, concept={"cat": "animal"}, own_samples=4 * batch,
            redirect_prompt=NEUTRAL,
        )  # fmt: skip
        return VDUTrainer(pipeline=pipeline, args=args, forget_dataset=forget, replay_dataset=replay)
    architecture = architecture_of(pipeline)
    choose_trainable(architecture, [trained])
    args = TrainingArguments(**common, remove_unused_columns=False)
    trainer = PlainDenoising(pipeline.unet.train(), args, train_dataset=forget, data_collator=default_collate)
    trainer.schedule, trainer.architecture = NoiseSchedule.of(pipeline.scheduler), architecture
    return trainer


def images_of(machine: Machine, shape: str) -> int:
    return 1 if machine.tiny else IMAGES[shape]


def of_denoiser(machine: Machine, shape: str, name: str, trained: str) -> dict[str, Any]:
    batches = 1 if name == "plain, 1 batch" else 2
    return run(lambda: denoising(machine, shape, name, trained), machine, images_of(machine, shape) * batches)


def of_closed_form(machine: Machine, shape: str) -> dict[str, Any]:
    """The words of a concept lead elsewhere: what it is to keep is encoded, and layers are changed."""
    pipeline = text_to_image(shape, machine.tiny, machine.device)
    machine.begin()
    begun = machine.now()
    keep = {"keep": OTHERS} if machine.tiny else {}
    ConceptRedirection.of(pipeline, ["cat"], anchor="animal", **keep).apply(pipeline)
    return {"seconds": machine.now() - begun, "step_mb": machine.most()}


# A filter


def of_filter(machine: Machine) -> dict[str, Any]:
    """1,000 pictures of 512 × 512 pixels, from PIL to a verdict; and the encoder alone on tensors of its own size."""
    side, number = (32, 20 * MARKS) if machine.tiny else (224, 1000)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=side, **(SMALL if machine.tiny else LARGE)))
    model = model.to(machine.device, torch.float32 if machine.tiny else torch.float16)
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (number, 16, 16, 3), dtype=np.uint8)
    pictures = [Image.fromarray(pixels).resize((2 * side if machine.tiny else 512,) * 2) for pixels in noise]
    encoder = FilterEncoder(model, kind="image")
    machine.begin()
    begun = machine.now()
    fitter = FASTFitter(encoder).update(undesired=pictures[:MARKS], unmarked=pictures[MARKS:])
    checker = fitter.fit(max_prevalence=0.5, rate=0.3).checker()
    fitted = machine.now()
    for first in range(0, number, 32):
        checker.judge(pictures[first : first + 32])
    judged = machine.now()
    ready = torch.rand(32, 3, side, side, device=machine.device, dtype=model.dtype)
    with torch.no_grad():
        for _ in range(0, number, 32):
            model(ready)
    alone = machine.now()
    return {
        "images": number, "fitting_seconds": fitted - begun, "seconds": judged - fitted, "encoder_seconds": alone - judged,
        "step_mb": machine.most(),
    }  # fmt: skip


LANGUAGE = (
    "plain, 1 text", "plain, 3 texts", "f-INE, 1 text", "UnlearnSFT, 1 + 2 texts, redirect", "UnlearnSFT, 1 + 2 texts, npo",
)  # fmt: skip


def parts() -> Iterator[tuple[str, str, Callable[[Machine], dict[str, Any]]]]:
    """Part, name and what measures it, the most asked for first."""
    yield "machine", "products", products
    for name in LANGUAGE:
        yield "Llama 8B, LoRA", name, partial(of_language, name=name)
    for shape in IMAGES:
        for trained in ("cross_attention", "all"):
            for name in ("plain, 1 batch", "plain, 2 batches", "VDU"):
                yield f"{shape}, {trained}", name, partial(of_denoiser, shape=shape, name=name, trained=trained)
        yield shape, "closed form, 1 concept", partial(of_closed_form, shape=shape)
    yield "CLIP ViT-L/14", "filter", of_filter


def row_of(measure: Callable[[Machine], dict[str, Any]], machine: Machine) -> dict[str, Any]:
    """What was measured, or why it was not."""
    begun = time.perf_counter()
    try:
        found = measure(machine)
    except Exception as error:  # memory runs out, or a kernel is missing: the next row goes on
        print(traceback.format_exc(), flush=True)
        found = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    machine.empty()
    return rounded(found | {"whole_seconds": time.perf_counter() - begun})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU; needs --out")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no further row begins")
    parser.add_argument("--only", nargs="+", default=[], help="parts whose names begin so")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.tiny and given.out == RESULTS:
        parser.error("--tiny: says nothing of a GPU; name another file with --out")
    if not given.tiny and not torch.cuda.is_available():
        parser.error("no GPU is seen by PyTorch; --tiny runs on the CPU")
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("hf_unlearn").setLevel(logging.ERROR)
    begun = time.perf_counter()
    for part, name, measure in parts():
        if given.only and not part.startswith(tuple(given.only)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            late = time.perf_counter() - begun > 60 * given.minutes
            machine = Machine(given.tiny, folder)
            row = {"left_out": "no time was left"} if late else row_of(measure, machine)
        row = {"part": part, "name": name, **row}
        print(json.dumps(row), flush=True)
        keep(given.out, [row], ("part", "name"))


if __name__ == "__main__":
    main()
