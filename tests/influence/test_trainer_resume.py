"""Recorded runs that are killed, with a real SIGKILL, and go on from a checkpoint: same weights, same records, bit for bit."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from brute_force import images, observations, same, settings, state
from safetensors.torch import load_file

from hf_unlearn.influence.report.records import read_observations
from hf_unlearn.influence.trainer import InfluenceTrainer


# 13 images in batches of 2, accumulated twice: 4 optimiser steps an epoch, the last of one micro-batch. The libraries are
# imported once; every run is a process of its own, forked from there.
DRIVER = """
import gc, json, os, signal, sys, traceback
from pathlib import Path

import torch
from brute_force import images, settings
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification

import hf_unlearn.influence.trainer as module
from hf_unlearn.influence.trainer import InfluenceTrainer


def run(folder, result, where="nowhere", step=0, resume=None, changes=None):
    def die(place, now):
        if (where, step) == (place, now):
            os.kill(os.getpid(), signal.SIGKILL)

    class Mortal(InfluenceTrainer):
        def training_step(self, *args, **kwargs):
            if len(self._micro) == 1:
                die("between two micro-batches", self.state.global_step)
            return super().training_step(*args, **kwargs)

        def _save_optimizer_and_scheduler(self, output_dir):
            die("in the middle of a checkpoint", self.state.global_step)
            super()._save_optimizer_and_scheduler(output_dir)

        def _save_checkpoint(self, model, trial):
            super()._save_checkpoint(model, trial)
            die("after a checkpoint", self.state.global_step)

    class MortalSweep(module.Sweep):
        def run(self, steps, record):
            super().run(steps, lambda step, *args: (die("in the sweep", step), record(step, *args)))

    module.Sweep = MortalSweep
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(
        image_size=16, patch_size=8, num_channels=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=10, hidden_dropout_prob=0.2, initializer_range=0.2,
    ))
    args = settings(
        folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=3,
        optim="adamw_torch", learning_rate=1e-3, max_grad_norm=1.0, lr_scheduler_type="linear",
        target_batch_size=3, save_strategy="steps", save_steps=2, **({"target_every": 3} | changes),
    )
    trainer = Mortal(model, args, train_dataset=images(13), target_dataset=images(5, seed=1))
    if where == "between two micro-batches":  # records are written at once, and else when they have to be
        module.Recorder.__init__.__kwdefaults__["rows_per_shard"] = 1
    trainer.train(resume_from_checkpoint=resume)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, result + ".safetensors")


torch.set_num_threads(1)
gc.freeze()  # every train() collects garbage
statuses = []
for job in json.loads(Path(sys.argv[1]).read_text()):
    if not (child := os.fork()):
        try:
            run(**job)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
Path(sys.argv[1] + ".statuses").write_text(json.dumps(statuses))
"""

SWEPT = {"observation": "propagated"}
RECOMPUTED = {"observation": "propagated", "trajectory_gigabytes": 1e-4, "last_steps": 9}
CASES = {  # where and at which step the run is killed, from which checkpoint it goes on, and settings
    "mid-epoch": ("between two micro-batches", 6, 6, {}),
    "mid-epoch, long after a look": ("between two micro-batches", 9, 8, {"target_every": 10}),
    "mid-checkpoint": ("in the middle of a checkpoint", 6, 4, {}),
    "after a checkpoint": ("after a checkpoint", 8, 8, {}),
    "propagated, mid-epoch": ("between two micro-batches", 5, 4, SWEPT),
    "propagated, mid-checkpoint": ("in the middle of a checkpoint", 6, 4, SWEPT),
    "propagated, in the sweep": ("in the sweep", 5, 12, SWEPT),
    "propagated, recomputed": ("between two micro-batches", 9, 8, RECOMPUTED),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of three runs for each case: undisturbed, killed, and that one resumed."""
    root = tmp_path_factory.mktemp("runs")
    jobs = []
    for name, (where, step, newest, changes) in CASES.items():
        folder = f"{root}/{name}"
        jobs += [
            {"folder": f"{folder}/calm", "result": f"{folder}/expected", "changes": changes},
            {"folder": f"{folder}/run", "result": f"{folder}/none", "where": where, "step": step, "changes": changes},
            {"folder": f"{folder}/run", "result": f"{folder}/actual", "resume": True if "mid-checkpoint" in name else f"{folder}/run/checkpoint-{newest}", "changes": changes},
        ]  # fmt: skip
    (root / "driver.py").write_text(DRIVER)
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, str(root / "driver.py"), str(root / "jobs.json")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    said = "\n".join(line for line in process.stderr.splitlines() if "it/s]" not in line)
    assert process.returncode == 0, said[-3000:]
    statuses = json.loads((root / "jobs.json.statuses").read_text())
    assert statuses == [0, -signal.SIGKILL, 0] * len(CASES), said[-3000:]
    return root


def same_records(first, second):
    names = ("step", "example", "weight", "value")
    whole = ("step", "weight", "size", "mean", "variance")
    return all(np.array_equal(getattr(first, n), getattr(second, n)) for n in names) and all(
        np.array_equal(getattr(first.steps, n), getattr(second.steps, n), equal_nan=True) for n in whole
    )


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_ends_as_if_nothing_had_happened(name, runs):
    folder = runs / name
    assert not Path(f"{folder}/none.safetensors").exists()
    assert same(load_file(f"{folder}/expected.safetensors"), load_file(f"{folder}/actual.safetensors"))
    (calm, calm_manifest), (resumed, manifest) = (
        read_observations(folder / kind / "_private" / "influence") for kind in ("calm", "run")
    )
    first = 3 if "last_steps" in CASES[name][3] else 0
    assert calm.steps.step.tolist() == list(range(first, 12))
    assert same_records(calm, resumed)
    assert len(resumed.example) == (27 if first else 39)
    for facts in (manifest, calm_manifest):  # differ between runs, and are the key and what is made with it
        assert facts.pop("run_id")
        assert facts.pop("looks")
    assert manifest == calm_manifest


class TestInOneProcess:
    @pytest.fixture(params=["in_run", "propagated"])
    def run(self, request, tiny_resnet, tmp_path):
        """Train, or go on, with every second step saved; the model is always the same one at the start."""

        def run(resume=None, *, rows=None, targets=None, **changes):
            values = {
                "observation": request.param,
                "save_strategy": "steps",
                "save_steps": 2,
                "max_steps": 6,
            } | changes
            trainer = InfluenceTrainer(
                copy.deepcopy(tiny_resnet),
                settings(tmp_path / "run", **values),
                train_dataset=images(13) if rows is None else rows,
                target_dataset=images(4, seed=1) if targets is None else targets,
            )
            trainer.train(resume_from_checkpoint=resume and str(tmp_path / "run" / f"checkpoint-{resume}"))
            return trainer

        run.folder, run.observation = tmp_path / "run", request.param
        return run

    def refused(self, run, match, **arguments):
        """Nothing is lost: not a record, not a step of the trajectory, not a checkpoint."""
        before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match=match) as error:
            run(**arguments)
        assert "\n" not in str(error.value)
        assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before

    def stopped(self, run, step=5):
        """A run that ends with an exception in the middle, as by Ctrl-C."""

        class Stopped(Exception):
            pass

        original = InfluenceTrainer._close_step

        def stop(self):
            original(self)
            if self.state.global_step == step - 1:
                raise Stopped

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(InfluenceTrainer, "_close_step", stop)
            with pytest.raises(Stopped):
                run()

    def test_steps_after_the_checkpoint_are_repeated(self, run):
        whole = run()
        expected, end = observations(whole), state(whole.model)
        self.stopped(run)
        if run.observation == "in_run":
            assert observations(whole).steps.step.tolist() == [0, 1, 2, 3, 4]
        resumed = run(resume=2)
        assert same(state(resumed.model), end)
        assert same_records(observations(resumed), expected)
        assert resumed.influence.top(3)["sample_id"] == whole.influence.top(3)["sample_id"]

    def test_the_run_keeps_its_name(self, run):
        self.stopped(run)
        before = read_observations(run.folder / "_private" / "influence")[1]["run_id"]
        assert run(resume=4).influence.manifest["run_id"] == before

    @pytest.mark.parametrize(
        "rows", [images(12), images(13).select(list(range(12, -1, -1)))], ids=["fewer", "reordered"]
    )
    def test_another_training_set(self, rows, run):
        self.stopped(run)
        self.refused(run, "^sample_ids: not those that", resume=4, rows=rows)
        assert len(observations(run(resume=4)).steps.step) == 6

    def test_another_training_set_with_the_same_ids(self, run):
        self.stopped(run)
        self.refused(
            run, "^resume_from_checkpoint: the training set has other rows", resume=4, rows=images(13, seed=9)
        )
        assert len(observations(run(resume=4)).steps.step) == 6

    def test_another_order_of_rows_without_ids(self, run):
        rows = images(13).remove_columns("id")
        run(rows=rows)
        self.refused(run, "the training set has other rows", resume=4, rows=rows.select(range(12, -1, -1)))

    def test_nothing_to_resume(self, tiny_resnet, tmp_path):
        trainer = InfluenceTrainer(
            tiny_resnet, settings(tmp_path), train_dataset=images(4), target_dataset=images(2, seed=1)
        )
        for name in ("checkpoint-3", "checkpoint-best", "checkpoint-4-old"):
            (tmp_path / name).mkdir()
            if name != "checkpoint-3":
                (tmp_path / name / "trainer_state.json").write_text("{}")
        with pytest.raises(ValueError, match="^resume_from_checkpoint=True: no whole checkpoint"):
            trainer.train(resume_from_checkpoint=True)

    def test_other_targets(self, run):
        self.stopped(run)
        targets = {"other": images(4, seed=1)}
        self.refused(run, "^resume_from_checkpoint: the run was started with targets", resume=4, targets=targets)

    def test_another_observation(self, run):
        self.stopped(run)
        other = {"in_run": "propagated", "propagated": "in_run"}[run.observation]
        self.refused(run, "^resume_from_checkpoint: .*with observation", resume=4, observation=other)

    def test_without_records(self, run):
        self.stopped(run)
        (run.folder / "_private" / "influence" / "manifest.json").unlink()
        self.refused(run, "holds no records", resume=4)

    def test_a_sweep_needs_the_steps_before(self, run):
        if run.observation == "in_run":
            return
        run()  # the trajectory is gone, the records are there
        self.refused(run, "^resume_from_checkpoint: step 0 of the run is not in", resume=4)
