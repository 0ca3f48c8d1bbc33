"""Runs that are killed by SIGKILL: each a process of its own, forked from one in which all is imported."""

import gc
import json
import os
import signal
import traceback
from pathlib import Path

import torch
from safetensors.torch import save_file
from trainers import JOBS, arguments, build, outcome, spoilt, weights
from transformers import TrainerCallback

import hf_unlearn.influence.trainer as influence
from hf_unlearn.training import runs


def run(job, folder, result, where="nowhere", step=0, resume=None, shards=None, changes=None):
    """One training of a job; dies at a place `where` in a step or, with its end written to `result`, does not.

    A run that goes on is given a model with other weights: what it needs is on disk. (What `adapt` is shown is drawn by it.)
    """

    def die(place, now):
        if (where, step) == (place, now):
            os.kill(os.getpid(), signal.SIGKILL)

    class Mortal:
        def _save_optimizer_and_scheduler(self, output_dir):
            assert list(Path(output_dir).rglob("*.safetensors"))  # the weights are there, and nothing else
            die("in a checkpoint", self.state.global_step)
            super()._save_optimizer_and_scheduler(output_dir)

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            begun.append(state.global_step)

        def on_substep_end(self, args, state, control, **kwargs):  # between two micro-batches, where there are two
            die("in a step", state.global_step)

        def on_pre_optimizer_step(self, args, state, control, **kwargs):  # of a GAN, one player has moved
            die("in a step", state.global_step)

    class MortalSweep(influence.Sweep):
        def run(self, steps, record):
            super().run(steps, lambda step, *args: (die("in the sweep", step), record(step, *args)))

    def now(call, place):
        return lambda *args, **kwargs: (die(place, trainer.state.global_step), call(*args, **kwargs))

    begun = []
    influence.Sweep = MortalSweep
    runs.mark_complete = now(runs.mark_complete, "before the marker")
    runs.rotate_checkpoints = now(runs.rotate_checkpoints, "before rotation")
    clear = influence.Trajectory.clear
    influence.Trajectory.clear = lambda self: (die("after the sweep", trainer.state.global_step), clear(self))
    if shards:
        influence.Recorder.__init__.__kwdefaults__["rows_per_shard"] = shards
    start = JOBS[job].start
    given = arguments(job, dropout=0.2)
    if resume and job != "adapt":
        spoilt(given[start])
    trainer = build(job, folder, mixin=Mortal, **(given | {"callbacks": [Steps()]} | (changes or {})))
    before = weights(trainer)
    trainer.train(resume_from_checkpoint=resume)
    Path(result + ".begun.json").write_text(json.dumps(begun))
    save_file(outcome(trainer), result + ".safetensors")
    save_file(before, result + ".start.safetensors")


def run_all(file):
    """The runs that a JSON file lists, one after the other; by `result`, exit code and what was said go to `<file>.ends`."""
    torch.set_num_threads(1)
    gc.freeze()  # every train() collects garbage
    ends = {}
    for job in json.loads(Path(file).read_text()):
        said = Path(job["result"])
        said.parent.mkdir(exist_ok=True)
        if not (child := os.fork()):
            try:
                torch.manual_seed(len(ends))  # a seed that is not the run's own decides nothing
                run(**job)
            except BaseException:
                said.write_text(traceback.format_exc())
                os._exit(1)
            os._exit(0)
        said.touch()
        ends[job["result"]] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read_text()
    Path(f"{file}.ends").write_text(json.dumps(ends))
