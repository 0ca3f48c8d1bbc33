"""Which training images taught a denoiser a class: scores of one training, judged by trainings on halves of the images.

    python benchmarks/influence_diffusion.py [--quick] [--only METHOD …]

A U-Net of 0.16 M parameters learns 200 digits of 8 × 8, of four classes. Targets are held-out images of each class, with 32 noises and timesteps that
are the same for all. The judge is the linear datamodeling score (arXiv 2303.14186): the same training on random halves, in which images of a class
stay or go by fives, and the rank correlation over halves between the sum of an image's scores in a half and the target's loss after it, both less their mean over
targets: from training to training the losses of all classes rise and fall together, whatever the images. Every half is trained on twice, with other seeds; how well the two agree is how far any score can agree with their mean. Trainings of halves are
kept in the cache. Ten minutes of one thread. Results: benchmarks/results/influence_diffusion.json.
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
from transformers.utils import logging

from hf_unlearn import DiffusionInfluenceConfig, DiffusionInfluenceTrainer, attribute
from hf_unlearn.examples.cache import cache_dir
from hf_unlearn.files import read_json, write_json
from hf_unlearn.influence.targets import Targets


RESULTS = Path(__file__).parent / "results" / "influence_diffusion.json"
CELLS = cache_dir() / "benchmarks" / "influence_diffusion"
CLASSES, OF_CLASS, TOGETHER, HELD_OUT = 4, 50, 5, 10
HALVES, TRAININGS, STEPS, TOP = 16, 2, 160, 20
METHODS = ["same class", "pixels", "cosine", "in_run", "one model", "propagated"]
SETTINGS = {
    "per_device_train_batch_size": 25, "learning_rate": 3e-3, "optim": "adamw_torch", "lr_scheduler_type": "linear", "weight_decay": 0.0,
    "max_grad_norm": 0.0, "use_cpu": True, "per_device_eval_batch_size": 10,
}  # fmt: skip


class Trained(DiffusionInfluenceTrainer):
    """σ of the sweep is read off an eighth of the images: it is one number a target, and changes no order."""

    def _panel_rows(self):
        return super()._panel_rows()[:1]


def pipeline(seed: int) -> DDPMPipeline:
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=1000))


def digits(of_class: int, held_out: int) -> tuple[Dataset, Dataset]:
    """Training images, class by class, and targets by class."""
    values, labels = load_digits(return_X_y=True)
    images = torch.tensor(values, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    order = np.random.default_rng(0).permutation(len(labels))
    each = [order[labels[order] == label] for label in range(CLASSES)]
    train = np.concatenate([some[:of_class] for some in each])
    held = np.concatenate([some[OF_CLASS:][:held_out] for some in each])
    made = [Dataset.from_dict({"image": images[rows].numpy(), "label": labels[rows]}) for rows in (train, held)]
    targets = made[1].add_column("target", [str(label) for label in made[1]["label"]])
    return made[0].add_column("id", list(range(len(train)))), targets.remove_columns("label")


def trainer_of(rows: Dataset, targets: Dataset, folder: str, seed: int, steps: int, **values) -> Trained:
    args = DiffusionInfluenceConfig(folder, seed=seed, max_steps=steps, **(QUIET | SETTINGS | values))
    return Trained(pipeline(seed), args, train_dataset=rows, target_dataset=targets)


def losses_of(trainer: Trained) -> dict[str, float]:
    """Of the targets, in the order of their names."""
    targets = trainer._targets()
    return dict(sorted(zip(targets.names, targets.losses(trainer.model).tolist(), strict=True)))


def half(number: int, rows: int) -> list[int]:
    """Neighbours, which are of one class, stay or go together."""
    groups = rows // TOGETHER
    kept = np.sort(np.random.default_rng([7, number]).permutation(groups)[: groups // 2])
    return (kept[:, None] * TOGETHER + np.arange(TOGETHER)).ravel().tolist()


def trained_on_half(number: int, again: int, rows: Dataset, targets: Dataset, steps: int) -> dict[str, float]:
    """The targets' losses after a training of its own seed, of which one layer is looked at, once, so that it costs little more than any."""
    file = CELLS / f"{steps}-{len(rows)}-{number}-{again}.json"
    if not file.is_file():
        with tempfile.TemporaryDirectory() as folder:
            some, seed = rows.select(half(number, len(rows))), 1000 + number + 100 * again
            seen = {"observation": "in_run", "layers": ["conv_out"], "target_every": steps}
            trainer = trainer_of(some, targets, folder, seed, steps, **seen)
            trainer.train()
            CELLS.mkdir(parents=True, exist_ok=True)
            write_json(losses_of(trainer), file)
        print(f"half {number}.{again}: {np.mean(list(read_json(file).values())):.4f}", flush=True)
    return read_json(file)


def cosines(trainer: Trained, rows: Dataset) -> np.ndarray:
    """`[images, targets]`: of the gradients of an image and of a target at the end, with the targets' noises and timesteps."""
    parameters, targets = list(trainer._parameters.values()), trainer._targets()
    single = Targets(
        {str(row): rows.select([row]) for row in range(len(rows))}, trainer._collate, trainer.per_example_loss, batch_size=1, seed=0
    )  # fmt: skip
    ours, theirs = (
        torch.nn.functional.normalize(some.gradients(trainer.model, parameters), dim=1) for some in (single, targets)
    )
    return (ours @ theirs[np.argsort(targets.names)].T).numpy()


def scores(method: str, rows: Dataset, targets: Dataset, steps: int) -> tuple[np.ndarray, float]:
    """`[images, targets]` by name of the target, and seconds of the processor."""
    began = time.process_time()
    names = np.array(targets["target"])
    if method == "same class":
        found = [np.array(rows["label"]) == int(name) for name in sorted(set(names))]
        return np.stack(found, 1).astype(float), time.process_time() - began
    if method == "pixels":
        images, wanted = (torch.tensor(np.array(some["image"])).flatten(1) for some in (rows, targets))
        alike = torch.nn.functional.normalize(images, dim=1) @ torch.nn.functional.normalize(wanted, dim=1).T
        columns = [alike[:, torch.from_numpy(names == name)].mean(1).numpy() for name in sorted(set(names))]
        return np.stack(columns, 1), time.process_time() - began
    with tempfile.TemporaryDirectory() as folder:
        if method in ("cosine", "one model"):
            seen = {"observation": "in_run", "layers": ["conv_out"], "target_every": steps}
            trainer = trainer_of(rows, targets, folder, 0, steps, **seen)
            trainer.train()
            began = time.process_time()
            if method == "cosine":
                return cosines(trainer, rows), time.process_time() - began
            trainer.save_model()
            args = DiffusionInfluenceConfig(folder, seed=0, max_steps=steps, **(QUIET | SETTINGS))
            report = attribute(folder, rows, targets, args=args)
        else:
            trainer = trainer_of(rows, targets, folder, 0, steps, observation=method)
            trainer.train()
            report = trainer.influence
    used = report.observations.since(report.burn_in)
    found = np.nan_to_num(used.example_mu().mu * used.sigma)  # in units of the loss
    return found[:, np.argsort(report.targets)], time.process_time() - began


def kept_scores(method: str, rows: Dataset, targets: Dataset, steps: int) -> tuple[np.ndarray, float]:
    """From the cache, if they are there."""
    file = CELLS / f"{steps}-{len(rows)}-{method.replace(' ', '-')}.json"
    if not file.is_file():
        found, seconds = scores(method, rows, targets, steps)
        CELLS.mkdir(parents=True, exist_ok=True)
        write_json({"scores": found.tolist(), "seconds": seconds}, file)
    cell = read_json(file)
    return np.array(cell["scores"]), cell["seconds"]


def of_their_own(values: np.ndarray) -> np.ndarray:
    """`[…, targets]` less the mean over targets: what is common to all is how well a training went, which nothing foretells."""
    return values - values.mean(-1, keepdims=True)


def agreement(said: np.ndarray, truth: np.ndarray) -> float:
    """Mean over targets of Spearman over halves, of `[halves, targets]`."""
    return float(np.nan_to_num([spearmanr(a, b)[0] for a, b in zip(said.T, truth.T, strict=True)]).mean())


def interval(said: np.ndarray, truth: np.ndarray) -> list[float]:
    """95 %, by drawing halves anew."""
    halves = len(truth)
    draws = np.random.default_rng(0).integers(0, halves, (1000, halves))
    values = [agreement(said[draw], truth[draw]) for draw in draws if len(set(draw.tolist())) > 2]
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images and steps: a minute; writes nothing")
    parser.add_argument("--only", nargs="+", default=METHODS, choices=METHODS, help="methods")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    rows, targets = digits(10, 2) if given.quick else digits(OF_CLASS, HELD_OUT)
    steps, halves = (10, 4) if given.quick else (STEPS, HALVES)
    names = sorted(set(targets["target"]))
    cells = [[trained_on_half(n, again, rows, targets, steps) for n in range(halves)] for again in range(TRAININGS)]
    each = -np.array([[[one[name] for name in names] for one in run] for run in cells])
    alike_as_it_is = agreement(*each)
    each = of_their_own(each)
    truth, alike = each.mean(0), agreement(*each)
    ceiling = float(np.sqrt(2 * max(alike, 0) / (1 + alike)))
    about = {
        "images": len(rows), "classes": CLASSES, "held_out": HELD_OUT, "halves": halves, "together": TOGETHER, "trainings": TRAININGS, "steps": steps,
        "top": TOP, "agreement": rounded(alike), "agreement_as_it_is": rounded(alike_as_it_is), "ceiling": rounded(ceiling),
    }  # fmt: skip
    print(json.dumps(about), flush=True)
    inside = np.zeros((halves, len(rows)))
    for number in range(halves):
        inside[number, half(number, len(rows))] = 1
    labels = np.array(rows["label"])
    for method in given.only:
        values, seconds = kept_scores(method, rows, targets, steps)
        said = of_their_own(inside @ values)
        top = [np.mean(labels[np.argsort(-values[:, c])[:TOP]] == int(name)) for c, name in enumerate(names)]
        low, high = interval(said, truth)
        row = {"method": method, "lds": agreement(said, truth), "lds_low": low, "lds_high": high}
        row |= {"own_class": float(np.mean(top)), "seconds": seconds}
        print(json.dumps(rounded(row)), flush=True)
        if not given.quick:
            keep(RESULTS, [rounded(row)], ("method",), **about)


if __name__ == "__main__":
    main()
