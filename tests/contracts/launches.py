"""Launches of two gloo processes in which not all is as it should be, each by torchrun's own agent.

The processes are forked from one that has imported all, so that a launch takes a second. What they come to is written to the folder.
"""

import gc
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from sharded import environment, told_of_accelerators
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from trainers import JOBS, QUIET, arguments, build, images, outcome, own_images, pairs, weights
from transformers import Trainer, TrainerCallback

from hf_unlearn import cli
from hf_unlearn.examples.classifier import digits_model, digits_processor
from hf_unlearn.influence.report.records import read_observations


# Three steps an epoch; checkpoints in the middle of them. Nothing is drawn by a process for itself, so that one and two come to the same.
ROWS, BATCH = 12, 4
SETTINGS = {
    "max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "guard": False, "replay_weight": 0.0,
    "target_every": 1, "forget_loss": "redirect",
}  # fmt: skip
SIZES = (1, 7)  # of what is evaluated, in batches of two
EVALUATED = ("unlearn", "vdu", "in_run", "fine")
FEW = ("sft", "vdu", "adapt", "in_run", "unlearn, shared", "pbu, shared")
LAYERS = {"unlearn": "ViTLayer", "pbu": "ResNetConvLayer"}


@dataclass(frozen=True)
class Death:
    """Where the last process dies: at the beginning of a step or in the middle of its checkpoint, and whether it can still say so."""

    step: int
    where: str = "step"
    says: str | None = None

    def now(self, where, step, args):
        if (where, step, args.process_index) != (self.where, self.step, args.world_size - 1):
            return
        if self.says:
            raise ValueError(self.says)
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Run:
    """A training: by how many processes, whether they share the parameters, and from which other run's folder it goes on.

    0 processes: one that was not launched.
    """

    job: str = "unlearn"
    processes: int = 0
    shared: bool = False
    death: Death | None = None
    resumes: str | None = None


BAD = "a row that cannot be read"
RUNS = {
    "calm": Run(),
    "calm, in_run": Run("in_run"),
    "one, killed": Run(death=Death(3)),
    "two, killed": Run(processes=2, death=Death(4, "checkpoint")),
    "two, in_run, a bad row": Run("in_run", 2, death=Death(3, says=BAD)),
    "shared, killed": Run(processes=2, shared=True, death=Death(3)),
    "shared, a bad row": Run(processes=2, shared=True, death=Death(3, says=BAD)),
    "1 to 2": Run(processes=2, resumes="one, killed"),
    "2 to 2": Run(processes=2, resumes="two, killed"),
    "2 to 1": Run(resumes="two, killed"),
    "2 to 1, in_run": Run("in_run", resumes="two, in_run, a bad row"),
    "shared to shared": Run(processes=2, shared=True, resumes="shared, a bad row"),
    "shared to 1 that shares": Run(processes=1, shared=True, resumes="shared, killed"),
    "shared to 1": Run(resumes="shared, killed"),
    "2 to shared": Run(processes=2, shared=True, resumes="two, killed"),
}  # fmt: skip


class Watched:
    """Notes the rows of each step, by a pixel of theirs, and dies where it is told to."""

    notes = death = None

    def training_step(self, model, inputs, *args):
        part = inputs.get("forget", inputs)
        self.seen.setdefault(self.state.global_step, []).extend(part["pixel_values"][:, 0, -1, -1].tolist())
        say(*self.notes, self.seen)
        return super().training_step(model, inputs, *args)

    def _save_rng_state(self, output_dir):
        if self.death:
            self.death.now("checkpoint", self.state.global_step, self.args)
        super()._save_rng_state(output_dir)


class Dies(TrainerCallback):
    def __init__(self, death):
        self.death = death

    def on_step_begin(self, args, state, control, **kwargs):
        self.death.now("step", state.global_step, args)


def sharing(shared, job):
    return environment(LAYERS[job]) if shared else nullcontext()


def config_of(job, folder, shared, **settings):
    kind = JOBS[job].config
    settings = {name: value for name, value in settings.items() if name in kind.__dataclass_fields__}
    args = kind(str(folder), **(QUIET | JOBS[job].values | settings))
    if shared:
        told_of_accelerators()
    return args


def say(folder, name, facts):
    rank = os.environ.get("RANK", "0")
    Path(folder, f"{name}-{rank}.json").write_text(json.dumps(facts))


def train(root, name):
    """A run of `RUNS`: writes what it says of itself, or the error that it ends with, and what it came to."""
    one, folder = RUNS[name], Path(root, name)
    say(root, f"{name}, process", os.getpid())
    batch = BATCH // max(1, one.processes)
    with sharing(one.shared, one.job):
        args = config_of(one.job, folder, one.shared, per_device_train_batch_size=batch, **SETTINGS)
        given = arguments(one.job)
        rows = "train_dataset" if one.job == "in_run" else "forget_dataset"
        given[rows] = images(ROWS, [0, 1, 2] if one.job == "in_run" else [3])
        mixin = type("Watched", (Watched,), {"seen": {}, "death": one.death, "notes": (root, f"{name}, seen")})
        trainer = build(
            one.job, folder, mixin=mixin, args=args, callbacks=[Dies(one.death)] if one.death else [], **given
        )
        start, error = weights(trainer), None
        try:
            trainer.train(resume_from_checkpoint=bool(one.resumes))
            trainer.save_model(folder / "final")
        except ValueError as raised:
            error = str(raised)
            if one.death:
                raise
        finally:
            say(root, name, {"error": error, "step": trainer.state.global_step})
        if trainer.is_world_process_zero():
            save_file(start, Path(root, f"{name}.start.safetensors"))
            if one.job == "in_run":
                save_file(outcome(trainer), Path(root, f"{name}.safetensors"))


def evaluated(folder):
    """`evaluate` of sets that do not divide, before anything is trained."""
    found = {}
    for job in EVALUATED:
        trainer = build(job, Path(folder, job), per_device_eval_batch_size=2)
        for size in SIZES:
            rows = some(job, size)
            if job in ("sft", "fine"):
                rows = trainer._prepare_dataset(rows, trainer.processing_class, trainer.args, False, None, "eval")
            told = trainer.predict(rows) if job == "unlearn" else None
            found[f"{job}, {size}"] = {
                "metrics": {k: v for k, v in trainer.evaluate(rows).items() if k in ("eval_loss", "eval_accuracy")},
                "predicted": told and {"loss": told.metrics["test_loss"], "logits": told.predictions.tolist(), "labels": told.label_ids.tolist()},
            }  # fmt: skip
    return found


def some(job, size):
    return pairs(size) if job in ("sft", "fine") else images(size, [4], size=16) if job == "pbu" else images(size)


def few(folder):
    """One example is trained on by two processes, in batches of two each."""
    found = {}
    for name in FEW:
        job, shared = name.split(", ")[0], name.endswith("shared")
        given = arguments(job)
        if job in ("gan", "adapt"):
            drawn = own_images(30, "pixel" if job == "adapt" else "batch")
            one = {"train_dataset": drawn[:1]} if job == "gan" else {"undesired": drawn[:1], "clean": drawn[1:2]}
        else:
            one = {"train_dataset" if "train_dataset" in given else "forget_dataset": some(job, 1)}
        with sharing(shared, job):
            # A step an epoch; GANs have no epochs.
            settings = {
                "per_device_train_batch_size": 2,
                "num_train_epochs": 2,
                "max_steps": 2 if job in ("gan", "adapt") else -1,
            }
            args = config_of(job, Path(folder, name), shared, **settings)
            trainer = build(job, folder, args=args, **(given | one))
            before = weights(trainer)
            trainer.train()
            after = trainer.evaluate(some(job, 3))["eval_loss"] if shared and job == "unlearn" else None
            model = trainer.accelerator.get_state_dict(trainer.model)
        found[name] = {"step": trainer.state.global_step, "after": after}
        if trainer.is_world_process_zero():
            moved = [
                (value - before[f"model/{key}"]).abs().max().item()
                for key, value in model.items()
                if f"model/{key}" in before
            ]
            found[name]["moved"] = max(moved)
        if hasattr(trainer, "records_dir"):
            seen = read_observations(trainer.records_dir)[0]
            found[name]["records"] = [seen.step.tolist(), seen.example.tolist(), seen.weight.tolist()]
    return found


def command(root, model):
    """`hf-unlearn unlearn` in two processes that share, and before it what is refused in one line. At its end a command leaves the others."""
    create = Trainer.create_accelerator_and_postprocess

    def told(self):
        told_of_accelerators()
        create(self)

    Trainer.create_accelerator_and_postprocess = told
    quick = ["--use_cpu", "true", "--disable_tqdm", "true", "--output_dir", f"{root}/cli", "--max_steps", "2"]
    quick += ["--guard", "false", "--save_strategy", "no"]
    codes = {}
    with environment(LAYERS["pbu"]):
        os.environ["FSDP_VERSION"] = "1"
        codes["fsdp 1"] = cli.main(["unlearn", "--config", "pbu_digits", "--model", f"{root}/nowhere", *quick])
        os.environ["FSDP_VERSION"] = "2"
        codes["shares"] = cli.main(["unlearn", "--config", "pbu_digits", "--model", model, *quick])
    say(root, "command", codes)


def digits(root):
    """Folder of a classifier that is not trained."""
    for part in (digits_model(), digits_processor()):
        part.save_pretrained(f"{root}/digits")
    return f"{root}/digits"


def together(root, names, works=(), model=None):
    """What the processes of one launch do, one after the other."""
    torch.set_num_threads(1)
    for work in works:
        say(root, work.__name__ + ("" if "RANK" in os.environ else ", alone"), work(root))
    for name in names:
        train(root, name)
    if model:
        command(root, model)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# Launching


def launch(root, processes, *args):
    """None, or of the processes that failed by themselves: exit code and message. All have ended when it returns."""
    logs = DefaultLogsSpecs(log_dir=tempfile.mkdtemp(dir=root), redirects=Std.ALL)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id="launch", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, monitor_interval=0.1, start_method="fork", logs_specs=logs,
    )  # fmt: skip
    try:
        elastic_launch(config, together)(root, *args)
    except ChildFailedError as error:
        return {rank: [failed.exitcode, str(failed.message)] for rank, failed in error.failures.items()}
    return None


def alone(root, *args):
    """In a process of its own, that was not launched: its exit code."""
    if not (child := os.fork()):
        try:
            together(root, *args)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_all(root):
    torch.set_num_threads(1)
    gc.freeze()  # every train() collects garbage
    ends = {}
    for name, one in RUNS.items():
        if one.death:
            ends[name] = launch(root, one.processes, [name]) if one.processes else alone(root, [name])
    for name, one in RUNS.items():
        if one.resumes:
            shutil.copytree(Path(root, one.resumes), Path(root, name))
    left = {n: [name for name, one in RUNS.items() if not one.death and one.processes == n] for n in (0, 1, 2)}
    ends["alone"] = alone(root, left[0], (evaluated,))
    ends["one that shares"] = launch(root, 1, left[1])
    ends["two"] = launch(root, 2, left[2], (evaluated, few), digits(root))
    Path(root, "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    run_all(sys.argv[1])
