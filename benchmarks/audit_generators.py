"""What an audit says of generators whose truth is known: originals, retrained ones, and models that VDU and Adapt-then-Unlearn made forget.

    python benchmarks/audit_generators.py [--quick] [--family ddpm gan] [--seeds 1] [--classes 3]

Digits: of each family one original a seed, of which each of three classes is to be forgotten, and five retrained models a class as references. Verdicts and
values go to benchmarks/results/audit_generators.json as they are found; models are kept in ~/.cache/hf_unlearn (minutes each). `--quick`: models of short
trainings, which hardly draw the class, three references, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import DDPMPipeline
from generators import called, images_of, judge, start
from rows import QUIET, keep, rounded
from transformers.trainer_callback import PrinterCallback

from hf_unlearn import AdaptThenUnlearnConfig, AdaptThenUnlearnTrainer, GANPipeline, VDUConfig, VDUTrainer
from hf_unlearn.audit import audit
from hf_unlearn.examples import ddpm, gan
from hf_unlearn.unlearning.diffusion.encoded import EncodedImages


RESULTS = Path(__file__).parent / "results" / "audit_generators.json"
DENOISING = 25  # steps
CLASSES, SEEDS, REFERENCES = (3, 6, 9), (1, 2), 5
MARKS = 20  # of undesired samples, for Adapt-then-Unlearn
RIGHT = {"original": "not forgotten", "retrained": "forgotten"}


@dataclass(frozen=True)
class World:
    """One family of small generators.

    Args:
        family (`str`): `"ddpm"` or `"gan"`.
        forgotten (`int`): the class that is to be forgotten.
        seed (`int`): of the original.
        references (`int`): retrained models.
        quick (`Path`, *optional*): a folder for models of short trainings; by default those of the cache.
    """

    family: str
    forgotten: int
    seed: int
    references: int
    quick: Path | None = None

    @property
    def denoising(self) -> int:
        """Steps of the sampler."""
        return DENOISING if self.quick is None else 10

    @property
    def module(self) -> Any:
        return {"ddpm": ddpm, "gan": gan}[self.family]

    def trained(self, seed: int, without: int | None = None) -> Any:
        recipe = replace(self.module.DIGITS, seed=seed)
        if self.quick is None:
            folder = self.module.cached(recipe, without=without)
        else:
            folder = self.quick / f"{self.family}-{seed}-{without}"
            if not folder.exists():
                images, labels = images_of("digits", False)
                shown = images if without is None else images[labels != without]
                small = {"checkpoints": 1, "channels": (8, 16)} if self.family == "ddpm" else {"base_channels": 16}
                short = replace(recipe, steps=400, **small)
                self.module.train(short, shown, folder, progress=False)
        return (DDPMPipeline if self.family == "ddpm" else GANPipeline).from_pretrained(folder)

    @cached_property
    def original(self) -> Any:
        return self.trained(self.seed)

    @cached_property
    def retrained(self) -> list[Any]:
        return [self.trained(100 + number, self.forgotten) for number in range(self.references)]

    def rows(self, forgotten: bool) -> Dataset:
        images, labels = images_of("digits", False)
        chosen = (labels == self.forgotten) == forgotten
        return Dataset.from_dict(
            {"pixel_values": images[chosen].numpy(), "label": labels[chosen].tolist()}
        ).with_format("torch")


def original(world: World) -> Any:
    return world.trained(world.seed)


def retrained(world: World) -> Any:
    """One that is none of the references."""
    return world.trained(100 + world.references, world.forgotten)


def vdu(world: World) -> Any:
    """With its defaults, from the forget images alone."""
    images, labels = images_of("digits", False)
    short = {} if world.quick is None else {"max_steps": 40, "own_samples": 200}
    with tempfile.TemporaryDirectory() as folder:
        args = VDUConfig(
            folder, seed=world.seed, num_inference_steps=world.denoising, grid_images=0, use_cpu=True, **short, **QUIET
        )
        forget = EncodedImages(images[labels == world.forgotten])
        trainer = VDUTrainer(pipeline=world.trained(world.seed), args=args, forget_dataset=forget)
        trainer.pop_callback(PrinterCallback)
        trainer.train()
    return trainer.pipeline


def adapt_then_unlearn(world: World) -> Any:
    """With its defaults, from marks on the first samples of the original."""
    pipeline = world.trained(world.seed)
    seen = pipeline.draw(torch.randn(5_000, 64, generator=torch.Generator().manual_seed(300 + world.seed)))
    marked = called("digits", world.forgotten, seen)
    end = int(marked.nonzero()[:MARKS][-1]) + 1
    short = {} if world.quick is None else {"max_steps": 100, "adapt_steps": 50}
    with tempfile.TemporaryDirectory() as folder:
        args = AdaptThenUnlearnConfig(folder, seed=world.seed, grid_images=0, **short, **QUIET)
        shown, kind = seen[:end], marked[:end]
        trainer = AdaptThenUnlearnTrainer(pipeline, args, undesired=shown[kind], clean=shown[~kind])
        trainer.pop_callback(PrinterCallback)
        trainer.train()
    return trainer.pipeline


CASES: dict[str, dict[str, Callable[[World], Any]]] = {
    "ddpm": {"original": original, "retrained": retrained, "VDU": vdu},
    "gan": {"original": original, "retrained": retrained, "Adapt-then-Unlearn": adapt_then_unlearn},
}


def row_of(report: Any, world: World, case: str) -> dict:
    checks = {
        one.name: {
            "audited": one.audited, "original": one.original, "retrained": list(one.retrained), "low": one.low, "high": one.high, "margin": one.margin,
            "status": one.status, "seconds": one.seconds, "pul": one.readings.audited.figures.get("pul"),
        }
        for one in report.results
    }  # fmt: skip
    return {
        "family": world.family, "case": case, "seed": world.seed, "class": world.forgotten, "right": RIGHT.get(case), "verdict": report.verdict.word,
        "decided_by": report.verdict.decided_by, "why": report.verdict.why, "residual_mu": report.residual.mu, "failed": dict(report.failed),
        "seconds": report.seconds, "estimated": report.estimated_seconds, "checks": checks,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="short trainings, one class, quick checks; nothing is written"
    )
    parser.add_argument("--family", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="of originals")
    parser.add_argument("--classes", nargs="+", type=int, default=CLASSES)
    options = parser.parse_args()
    start()
    with tempfile.TemporaryDirectory() as scratch:
        seeds, classes = ((1,), (3,)) if options.quick else (options.seeds, options.classes)
        make = (
            partial(World, references=3, quick=Path(scratch))
            if options.quick
            else partial(World, references=REFERENCES)
        )
        for family in options.family:
            for world in [make(family, forgotten, seed) for seed in seeds for forgotten in classes]:
                for case, way in CASES[family].items():
                    report = audit(
                        way(world), world.original, world.retrained, forget=world.rows(True), retain=world.rows(False), marker=judge("digits"),
                        drawing={"num_inference_steps": world.denoising} if family == "ddpm" else None, checks="quick" if options.quick else "standard",
                    )  # fmt: skip
                    row = rounded(row_of(report, world, case))
                    print(json.dumps({key: value for key, value in row.items() if key != "checks"}), flush=True)
                    for name, one in row["checks"].items():
                        values = {key: one[key] for key in ("audited", "original", "retrained", "status", "pul")}
                        print(f"  {name}: {json.dumps(values)}", flush=True)
                    if not options.quick:
                        keep(RESULTS, [row], ("family", "case", "seed", "class"))


if __name__ == "__main__":
    main()
