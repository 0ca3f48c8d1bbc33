"""Every trainer in each of several gloo processes, or in one that does the halves of every batch one after the other.

Started by torchrun with a folder. All runs are of one launch: what costs time is importing the libraries.
"""

import gc
import json
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from trainers import GANS, JOBS, arguments, build, gan, images, outcome, seeded, weights

from hf_unlearn import AdaptThenUnlearnTrainer, GANTrainer
from hf_unlearn.modes import seeded_generator
from hf_unlearn.unlearning.diffusion import own_samples
from hf_unlearn.unlearning.guard import LOOKING
from hf_unlearn.unlearning.trainer import UnlearnMixin


LOUD = {"logging_strategy": "steps", "logging_steps": 1, "guard": False, "max_steps": 3}
BATCH = 4  # of all processes together
SAVING = {"save_strategy": "steps", "save_steps": 2}
OWN = {"max_steps": 2, "max_grad_norm": 0.0, "average_tokens_across_devices": False}
DESCENDING = {  # forgets at once, and then loses what is to be kept
    "guard": True, "guard_steps": 1, "guard_patience": 2, "forget_loss": "ascent", "learning_rate": 0.05, "max_steps": 12,
    "utility_tolerance": 0.1, "replay_weight": 0.0,
} | SAVING  # fmt: skip


class Pairs:
    """Keeps the retain rows of every step."""

    retained = ()

    def retain_loss(self, model, batch):
        self.retained = [*self.retained, *batch["pixel_values"][:, 0, -1, -1].tolist()]
        return super().retain_loss(model, batch)


class Evaluated:
    """Is evaluated before it is trained."""

    def train(self, *args, **kwargs):
        self.evaluate(self.train_dataset)
        return super().train(*args, **kwargs)


class Broken:
    """An infinite loss on the last process only, with finite gradients, from the third step on."""

    def task_loss(self, model, batch):
        loss = super().task_loss(model, batch)
        last = self.args.process_index == self.args.world_size - 1
        return loss + (math.inf if self.is_in_train and last and self.state.global_step == 2 else 0.0)


class Blind:
    """The last process is shown images that are not finite."""

    def training_step(self, model, inputs, *args):
        if self.args.process_index == self.args.world_size - 1:
            inputs["pixel_values"][:] = math.nan
        return super().training_step(model, inputs, *args)


def runs(processes):
    """Name of a run to `(job, mixin, changes)`; batches are of all processes together."""
    each = {"per_device_train_batch_size": BATCH // processes}
    halved = {"per_device_train_batch_size": BATCH // 2 // processes, "gradient_accumulation_steps": 2}
    for name, job in JOBS.items():
        alike = LOUD | each
        if "bn" in {field.name for field in fields(job.config)}:
            alike["bn"] = "frozen"  # else statistics are of a process's own batches
        if name in GANS:
            alike |= {"path_length_weight": 0.0, "per_device_train_batch_size": 2 * BATCH // processes}
        if name == "gan":  # whose batch norm is of a process's own batches
            alike["model"] = seeded(gan, "pixel")
        yield (
            name,
            name,
            None,
            {key: value for key, value in alike.items() if key in job.config.__dataclass_fields__ or key == "model"},
        )
    for name in ("unlearn", "vdu", "in_run", "fine"):
        loud = {key: value for key, value in LOUD.items() if key in JOBS[name].config.__dataclass_fields__}
        yield f"{name}, accumulated", name, None, loud | halved
    yield "fine, each its own tokens", "fine", None, each | OWN
    uneven = {"per_device_train_batch_size": 6 // processes, "max_steps": -1, "num_train_epochs": 1}
    yield "in_run, uneven", "in_run", None, uneven | {"train_dataset": images(16, [0, 1, 2])}
    for name in ("unlearn", "in_run"):
        loud = {key: value for key, value in LOUD.items() if key in JOBS[name].config.__dataclass_fields__}
        yield f"{name}, evaluated", name, Evaluated, loud | each
    yield "unlearn, pairs", "unlearn", Pairs, each | {"guard": False, "max_steps": -1, "num_train_epochs": 4}
    yield "pbu, guarded", "pbu", None, each | DESCENDING
    yield "pbu, guarded, resumed", "pbu", None, each | DESCENDING
    yield "gan, guarded", "gan", None, {"max_steps": 4} | SAVING
    yield "gan, guarded, resumed", "gan", None, {"max_steps": 6} | SAVING
    yield "unlearn, broken", "unlearn", Broken, each | {"forget_loss": "ascent", "max_steps": 6}
    yield "gan, broken", "gan", Blind, {"max_steps": 4, "model": seeded(gan, "pixel")}


def run(folder, name, job, mixin, changes):
    """Writes what a run came to, and what it says of itself, for this process."""
    torch.manual_seed(0)
    facts, found, start = {"error": None}, {}, {}
    try:
        given = arguments(job) | changes
        for argument in ("forget_dataset", "train_dataset"):
            if isinstance(given.get(argument), Dataset) and name != "in_run, uneven":
                given[argument] = given[argument].select(range(8))  # or accelerate would fill the last batch up
        trainer = build(job, folder / name.removesuffix(", resumed"), mixin=mixin, **given)
        start = found = weights(trainer)
        trainer.train(resume_from_checkpoint=name.endswith(", resumed"))
        trainer.save_model()
        found = outcome(trainer)
    except (ValueError, FloatingPointError) as error:
        facts["error"] = str(error)
        found = weights(trainer) if found else {}
    if found:
        facts |= {
            "step": trainer.state.global_step,
            "retained": list(getattr(trainer, "retained", ())),
            "logs": [
                {k: v for k, v in log.items() if not any(word in k for word in ("time", "second", "flos"))}
                for log in trainer.state.log_history
            ],
            "top": trainer.influence.top(3)["sample_id"][:] if hasattr(trainer, "records_dir") else None,
            "own": trainer.own.kept.latents.sum().item() if hasattr(trainer, "own") else None,
            "guard": trainer.guard.state.to_json() if hasattr(getattr(trainer, "guard", None), "state") else None,
        }
    rank = os.environ.get("RANK", 0)
    (folder / f"{name}-{rank}.json").write_text(json.dumps(facts))
    save_file(found, folder / f"{name}-{rank}.safetensors")
    save_file(start, folder / f"{name}-{rank}.start.safetensors")


def run_all(folder, processes):
    folder = Path(folder)
    torch.set_num_threads(1)
    gc.freeze()  # every train() collects garbage
    generate = own_samples.generate

    def noted(*args, **kwargs):
        with open(folder / "drawn", "a") as file:
            file.write("drawn\n")
        return generate(*args, **kwargs)

    own_samples.generate = noted
    try:
        for name, job, mixin, changes in runs(processes):
            run(folder, name, job, mixin, changes)
    finally:
        own_samples.generate = generate


# One process that stands for two


def _half(inputs, which):
    if not isinstance(inputs, dict):
        size = len(inputs) // 2
        return inputs[which * size : (which + 1) * size]
    half = {name: _half(value, which) for name, value in inputs.items()}
    if "attention_mask" in half:  # padded to the longest of the half alone
        longest = int(half["attention_mask"].sum(1).max())
        half = {name: value[:, :longest] if value.dim() > 1 else value for name, value in half.items()}
    return half


@contextmanager
def as_two(patch):
    """One process draws for each half of a batch what the process would have drawn that had this half alone."""
    compute_loss, latents, false_images = (
        UnlearnMixin.compute_loss, GANTrainer._latents, AdaptThenUnlearnTrainer.false_images
    )  # fmt: skip

    def generator(self, *key):
        process = 0 if LOOKING in key and not isinstance(self, GANTrainer) else getattr(self, "_process", 0)
        return seeded_generator(self.args.device, self.args.seed, process, *key)

    def both_losses(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "forget" not in inputs:
            return compute_loss(self, model, inputs, return_outputs=return_outputs)
        losses = []
        for self._process in (0, 1):
            losses.append(compute_loss(self, model, _half(inputs, self._process)))
        return (losses[0] + losses[1]) / 2

    def both(original):
        def parts(self, count, *key, **named):
            drawn = []
            for self._process in (0, 1):
                drawn.append(original(self, count // 2, *key, **named))
            return None if drawn[0] is None else torch.cat(drawn)

        return parts

    for kind in (UnlearnMixin, GANTrainer):
        patch.setattr(kind, "_generator", generator)
    patch.setattr(UnlearnMixin, "compute_loss", both_losses)
    patch.setattr(GANTrainer, "_latents", both(latents))
    patch.setattr(AdaptThenUnlearnTrainer, "false_images", both(false_images))
    yield


if __name__ == "__main__":
    run_all(sys.argv[1], 2)
    torch.distributed.destroy_process_group()
    print("all done", flush=True)
