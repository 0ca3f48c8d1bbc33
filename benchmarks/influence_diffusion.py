"""Which training images taught a denoiser a class: scores of one training, judged by trainings on halves of the images.

    python benchmarks/influence_diffusion.py [--quick]

A U-Net of 0.1 M parameters learns 400 digits of 8 × 8. Targets are held-out images of each class, with 32 noises and timesteps that are the same for
all. The judge is the linear datamodeling score (arXiv 2303.14186): the same training on random halves, each once, and the rank
correlation over halves between the sum of an image's scores in a half and the target's loss after it. Trainings of halves are kept in the
cache. Twenty minutes on two idle cores. Results: benchmarks/results/influence_diffusion.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from rows import QUIET, keep, rounded
from scipy.stats import spearmanr
from sklearn.datasets import load_digits

from hf_unlearn import DiffusionInfluenceConfig, DiffusionInfluenceTrainer, attribute
from hf_unlearn.examples.cache import cache_dir
from hf_unlearn.files import read_json, write_json


RESULTS = Path(__file__).parent / "results" / "influence_diffusion.json"
CELLS = cache_dir() / "benchmarks" / "influence_diffusion"
ROWS, HELD_OUT, HALVES, STEPS, TOP = 400, 20, 32, 600, 20
SETTINGS = {
    "per_device_train_batch_size": 32, "learning_rate": 3e-3, "optim": "adamw_torch", "lr_scheduler_type": "linear", "weight_decay": 0.0,
    "max_grad_norm": 0.0, "use_cpu": True, "per_device_eval_batch_size": 10,
}  # fmt: skip


def pipeline(seed: int) -> DDPMPipeline:
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=1000))


def digits() -> tuple[Dataset, Dataset]:
    """Training images, as many of each class, and targets by class."""
    values, labels = load_digits(return_X_y=True)
    images = torch.tensor(values, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    order = np.random.default_rng(0).permutation(len(labels))
    of_class = [order[labels[order] == label] for label in range(10)]
    train = np.concatenate([some[: ROWS // 10] for some in of_class])
    held = np.concatenate([some[ROWS // 10 :][:HELD_OUT] for some in of_class])
    made = [Dataset.from_dict({"image": images[rows].numpy(), "label": labels[rows]}) for rows in (train, held)]
    targets = made[1].add_column("target", [str(label) for label in made[1]["label"]])
    return made[0].add_column("id", list(range(len(train)))), targets.remove_columns("label")


def trainer_of(
    rows: Dataset, targets: Dataset, folder: str, seed: int, steps: int, **values
) -> DiffusionInfluenceTrainer:
    args = DiffusionInfluenceConfig(folder, seed=seed, max_steps=steps, **(QUIET | SETTINGS | values))
    return DiffusionInfluenceTrainer(pipeline(seed), args, train_dataset=rows, target_dataset=targets)


def losses_of(trainer: DiffusionInfluenceTrainer) -> list[float]:
    """Of the targets, in the order of their names."""
    targets = trainer._targets()
    return dict(sorted(zip(targets.names, targets.losses(trainer.model).tolist(), strict=True)))


def half(number: int, rows: int) -> list[int]:
    return sorted(np.random.default_rng([7, number]).permutation(rows)[: rows // 2].tolist())


def trained_on_half(number: int, rows: Dataset, targets: Dataset, steps: int) -> dict[str, float]:
    """The targets' losses; a training of its own seed, observed so seldom that it costs nothing."""
    file = CELLS / f"{steps}-{len(rows)}-{number}.json"
    if not file.is_file():
        with tempfile.TemporaryDirectory() as folder:
            some = rows.select(half(number, len(rows)))
            trainer = trainer_of(some, targets, folder, 1000 + number, steps, observation="in_run", target_every=steps)
            trainer.train()
            CELLS.mkdir(parents=True, exist_ok=True)
            write_json(losses_of(trainer), file)
        print(f"half {number}: {np.mean(list(read_json(file).values())):.4f}", flush=True)
    return read_json(file)


def scores(method: str, rows: Dataset, targets: Dataset, steps: int) -> tuple[np.ndarray, float]:
    """`[images, targets]` by name of the target, and seconds."""
    began = time.perf_counter()
    if method == "pixels":
        images, wanted = (torch.tensor(np.array(some["image"])).flatten(1) for some in (rows, targets))
        alike = torch.nn.functional.normalize(images, dim=1) @ torch.nn.functional.normalize(wanted, dim=1).T
        names = np.array(targets["target"])
        columns = [alike[:, torch.from_numpy(names == name)].mean(1).numpy() for name in sorted(set(names))]
        return np.stack(columns, 1), time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        if method == "one model":
            trainer = trainer_of(rows, targets, folder, 0, steps, observation="in_run", target_every=steps)
            trainer.train()
            trainer.save_model()
            began = time.perf_counter()
            args = DiffusionInfluenceConfig(folder, seed=0, max_steps=steps, **(QUIET | SETTINGS))
            report = attribute(folder, rows, targets, args=args)
        else:
            trainer = trainer_of(rows, targets, folder, 0, steps, observation=method)
            trainer.train()
            report = trainer.influence
        found = [np.nan_to_num(report._values("mu", name)) for name in sorted(report.targets)]
    return np.stack(found, 1), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images and steps: a minute; writes nothing")
    parser.add_argument("--only", nargs="+", default=["pixels", "in_run", "one model", "propagated"], help="methods")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows, targets = digits()
    steps, halves = (20, 4) if given.quick else (STEPS, HALVES)
    if given.quick:
        rows, targets = rows.select(range(0, ROWS, 8)), targets.select(range(0, 10 * HELD_OUT, 10))
    names = sorted(set(targets["target"]))
    truth = [trained_on_half(number, rows, targets, steps) for number in range(halves)]
    truth = -np.array([[one[name] for name in names] for one in truth])
    inside = np.zeros((halves, len(rows)))
    for number in range(halves):
        inside[number, half(number, len(rows))] = 1
    labels, found = np.array(rows["label"]), []
    for method in given.only:
        values, seconds = scores(method, rows, targets, steps)
        said = inside @ values

        def agreement(chosen: np.ndarray, said: np.ndarray = said) -> float:
            return float(np.mean([spearmanr(said[chosen, c], truth[chosen, c])[0] for c in range(len(names))]))

        draws = np.random.default_rng(0).integers(0, halves, (200, halves))
        spread = np.std([agreement(draw) for draw in draws if len(set(draw.tolist())) > 2])
        top = [np.mean(labels[np.argsort(-values[:, c])[:TOP]] == int(name)) for c, name in enumerate(names)]
        row = {
            "method": method,
            "lds": agreement(np.arange(halves)),
            "lds_error": spread,
            "own_class": np.mean(top),
            "seconds": seconds,
        }
        found.append(rounded({key: value if isinstance(value, str) else float(value) for key, value in row.items()}))
        print(json.dumps(found[-1]), flush=True)
        if not given.quick:
            about = {"rows": ROWS, "held_out": HELD_OUT, "halves": HALVES, "steps": STEPS, "top": TOP}
            keep(RESULTS, found, ("method",), **about)


if __name__ == "__main__":
    main()
