"""Runs that are killed, with a real SIGKILL, and go on from their newest complete checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from image_data import arguments, images, same, weights
from safetensors.torch import load_file

from hf_unlearn import PBUConfig, PBUTrainer, UnlearnTrainer
from hf_unlearn.unlearning import checkpoint as checkpoints
from hf_unlearn.unlearning.checkpoint import MARKER


# 13 forget images in batches of 2, accumulated twice: 4 optimiser steps an epoch, the last of one micro-batch. The libraries
# are imported once; every run is a process of its own, forked from there.
DRIVER = """
import gc, json, os, signal, sys, traceback
from pathlib import Path

import torch
from image_data import arguments, images
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification

import hf_unlearn.unlearning.trainer as module
from hf_unlearn import UnlearnTrainer


def run(folder, result, where="nowhere", step=0, resume=None, settings=None):
    def die(place):
        if where == place and trainer.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    class Mortal(UnlearnTrainer):
        def training_step(self, *args, **kwargs):
            if self._micro_step == 1:
                die("between two micro-batches")
            return super().training_step(*args, **kwargs)

        def _save_optimizer_and_scheduler(self, output_dir):
            assert (Path(output_dir) / "model.safetensors").exists()
            die("in the middle of a checkpoint")
            super()._save_optimizer_and_scheduler(output_dir)

    mark, rotate = module.mark_complete, module.rotate_checkpoints
    module.mark_complete = lambda *args: (die("before the marker"), mark(*args))
    module.rotate_checkpoints = lambda *args, **kwargs: (die("before rotation"), rotate(*args, **kwargs))

    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(
        image_size=16, patch_size=8, num_channels=1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=10, hidden_dropout_prob=0.2, initializer_range=0.2,
    ))
    args = arguments(
        folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=3,
        optim="adamw_torch", learning_rate=1e-3, max_grad_norm=1.0, replay_weight=1.0, isotropic_weight=0.1,
        fisher_weight=0.1, lr_scheduler_type="linear", guard=True, guard_patience=50, utility_tolerance=100.0,
        save_strategy="steps", **settings,
    )
    trainer = Mortal(
        model, args, forget_dataset=images(13, [3]), retain_dataset=images(5, [0, 1], seed=1),
        eval_dataset={"retain": images(9, [0, 1, 2], seed=2)},
    )
    trainer.train(resume_from_checkpoint=resume)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, result + ".safetensors")
    Path(result + ".json").write_text(json.dumps({
        "step": trainer.state.global_step, "guard": trainer.guard.state.to_json(),
    }))


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
    complete = sorted(int(path.parent.name.split("-")[1]) for path in Path(job["folder"]).glob("checkpoint-*/unlearning.json"))
    statuses[-1] = [statuses[-1], complete]
Path(sys.argv[1] + ".statuses").write_text(json.dumps(statuses))
"""

EVERY_TWO_STEPS = {"save_steps": 2, "guard_steps": 3}
ONE_CHECKPOINT = {"save_steps": 2, "guard_steps": 3, "save_total_limit": 1}
EVERY_EPOCH = {"save_steps": 4, "save_total_limit": 1}  # as the guard's looks
CASES = {  # where and at which step the run is killed, and the newest checkpoint that it leaves
    "mid-epoch": ("between two micro-batches", 6, 6, EVERY_TWO_STEPS),
    "mid-checkpoint": ("in the middle of a checkpoint", 6, 4, EVERY_TWO_STEPS),
    "before the marker": ("before the marker", 8, 6, ONE_CHECKPOINT),
    "before rotation": ("before rotation", 8, 8, EVERY_EPOCH),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`(exit status, complete checkpoints)` of three runs for each case: undisturbed, killed, resumed; and their folder."""
    root = tmp_path_factory.mktemp("runs")
    jobs = []
    for name, (where, step, _, settings) in CASES.items():
        jobs += [
            {"folder": f"{root}/{name}/calm", "result": f"{root}/{name}/expected", "settings": settings},
            {"folder": f"{root}/{name}/run", "result": f"{root}/{name}/none", "where": where, "step": step, "settings": settings},
            {"folder": f"{root}/{name}/run", "result": f"{root}/{name}/actual", "resume": True, "settings": settings},
        ]  # fmt: skip
    (root / "driver.py").write_text(DRIVER)
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, str(root / "driver.py"), str(root / "jobs.json")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    statuses = json.loads((root / "jobs.json.statuses").read_text())
    assert [status for status, _ in statuses] == [0, -signal.SIGKILL, 0] * len(CASES), process.stderr[-3000:]
    return root, {name: statuses[3 * i : 3 * i + 3] for i, name in enumerate(CASES)}


def outcome(result):
    return load_file(f"{result}.safetensors"), json.loads(Path(f"{result}.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_ends_as_if_nothing_had_happened(name, runs):
    root, statuses = runs
    newest, settings = CASES[name][2:]
    assert statuses[name][1][1][-1] == newest
    assert not (root / name / "none.json").exists()
    (expected_weights, expected), (actual_weights, actual) = (outcome(root / name / k) for k in ("expected", "actual"))
    assert expected["step"] == actual["step"] == 12
    assert actual["guard"] == expected["guard"]
    assert len(expected["guard"]["looks"]) >= 4
    assert same(expected_weights, actual_weights)
    if "save_total_limit" in settings:
        assert len(list((root / name / "run").glob("checkpoint-*"))) == 1


class Stops(UnlearnTrainer):
    """Forgotten at step 2; from then on utility falls."""

    def remembered(self):
        return 2.0 - self.state.global_step

    def utility_drop(self, baseline):
        return 0.001 * self.state.global_step


class TestGuardGoesOn:
    def run(self, model, folder, resume=None, **values):
        settings = {
            "guard": True, "guard_steps": 1, "guard_patience": 2, "max_steps": 10, "save_strategy": "steps",
            "save_steps": 1, "learning_rate": 0.05,
        }  # fmt: skip
        trainer = Stops(model, arguments(folder, **(settings | values)), forget_dataset=images(4, [3]))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def test_a_run_that_the_guard_had_stopped_stays_stopped(self, tiny_vit, tmp_path):
        first = self.run(tiny_vit, tmp_path)
        end, state = weights(tiny_vit), first.guard.state
        assert (first.state.global_step, first.guard.best.step) == (4, 2)
        again = self.run(tiny_vit, tmp_path, resume=True)
        assert again.guard.state == state
        assert same(weights(tiny_vit), end)

    def test_patience_is_counted_on(self, tiny_vit, tmp_path):
        self.run(tiny_vit, tmp_path)
        end = weights(tiny_vit)
        shutil.rmtree(tmp_path / "checkpoint-4")
        again = self.run(tiny_vit, tmp_path, resume=True)
        assert [look.step for look in again.guard.looks] == [0, 1, 2, 3, 4]
        assert same(weights(tiny_vit), end)

    def test_without_the_best_states_file_the_last_state_is_kept(self, tiny_vit, tmp_path, caplog):
        self.run(tiny_vit, tmp_path)
        shutil.rmtree(tmp_path / "_private" / "guard")
        with caplog.at_level("WARNING", "hf_unlearn"):
            self.run(tiny_vit, tmp_path, resume=True)
        assert "step 2, is gone" in caplog.text


class TestRefused:
    @pytest.fixture
    def run(self, tiny_resnet, tmp_path):
        def run(resume=None, trainer_class=UnlearnTrainer, **values):
            config = {"config": trainer_class._config_class, "save_strategy": "steps", "save_steps": 1, "optim": "sgd"}
            args = arguments(tmp_path / "run", **(config | values))
            trainer = trainer_class(tiny_resnet, args, forget_dataset=images(4, [3]))
            trainer.train(resume_from_checkpoint=resume)
            return trainer

        return run

    def refused(self, run, match, **arguments):
        with pytest.raises(ValueError, match=f"^resume_from_checkpoint: .*{match}") as error:
            run(**arguments)
        assert "\n" not in str(error.value)

    def test_no_checkpoint(self, run):
        self.refused(run, "no complete checkpoint in .*run'; start without it", resume=True)

    def test_a_path_that_is_none(self, run, tmp_path):
        self.refused(run, "no complete unlearning checkpoint", resume=str(tmp_path / "elsewhere"))

    def test_an_incomplete_checkpoint(self, run, tmp_path):
        run()
        newest = tmp_path / "run" / "checkpoint-3"
        (newest / MARKER).unlink()
        self.refused(run, "checkpoint-3' is no complete", resume=str(newest))
        assert run(resume=True).state.global_step == 3  # from checkpoint-2

    def test_another_method(self, run):
        run()
        self.refused(run, "method 'unlearn', this is 'pbu'", resume=True, trainer_class=PBUTrainer, config=PBUConfig)

    def test_another_format(self, run, tmp_path):
        run()
        marker = tmp_path / "run" / "checkpoint-3" / MARKER
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format": 99}))
        self.refused(run, "format 99", resume=True)

    @pytest.mark.parametrize("name", ["reference", "fisher"])
    def test_private_files_that_are_missing(self, name, run, tmp_path):
        run(fisher_weight=0.1)
        (tmp_path / "run" / "_private" / f"{name}.safetensors").unlink()
        self.refused(run, f"{name}.safetensors is missing", resume=True, fisher_weight=0.1)

    def test_the_reference_is_the_original_and_not_the_checkpoint(self, run, tiny_resnet, tmp_path):
        start = weights(tiny_resnet)
        run()
        end = weights(tiny_resnet)
        trainer = run(resume=str(tmp_path / "run" / "checkpoint-1"))
        assert all(start[name].equal(value) for name, value in trainer.reference.parameters.items())
        assert same(end, weights(tiny_resnet))

    def test_writing_over_a_checkpoint_unmarks_it_first(self, run, tmp_path, monkeypatch):
        run()
        seen = []
        save = UnlearnTrainer._save_optimizer_and_scheduler

        def look(self, output_dir):
            seen.append(Path(output_dir, MARKER).exists())
            save(self, output_dir)

        monkeypatch.setattr(UnlearnTrainer, "_save_optimizer_and_scheduler", look)
        run()
        assert seen == [False] * 3
        assert checkpoints.last_complete(tmp_path / "run").endswith("checkpoint-3")
