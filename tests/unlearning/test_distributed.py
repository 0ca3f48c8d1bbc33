"""Two processes on CPU (gloo), started by torchrun, against one process with the same global batch."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from image_data import distance, same
from safetensors.torch import load_file


# All runs of one launch, one after the other: what costs time is importing the libraries.
DRIVER = '''
import gc, json, math, sys
from pathlib import Path

import torch
from image_data import arguments, images
from safetensors.torch import save_file
from transformers import ResNetConfig, ResNetForImageClassification

from hf_unlearn import UnlearnTrainer

torch.set_num_threads(1)
gc.freeze()  # every train() collects garbage
folder, processes = Path(sys.argv[1]), int(sys.argv[2])


class Deterministic(UnlearnTrainer):
    def replay_inputs(self, batch, generator):
        return batch | {"pixel_values": batch["pixel_values"].flip(-1)}


class Recorder(UnlearnTrainer):
    """Keeps the retain rows of every step."""

    retained = ()

    def retain_loss(self, model, batch):
        self.retained = [*self.retained, *batch["pixel_values"][:, 0, 0, 0].tolist()]
        return super().retain_loss(model, batch)


class BrokenOnOne(UnlearnTrainer):
    """Infinite loss on the last process only, with finite gradients, from the third step on."""

    def task_loss(self, model, batch):
        loss = super().task_loss(model, batch)
        last = self.args.process_index == self.args.world_size - 1
        return loss + (math.inf if self.is_in_train and last and self.state.global_step == 2 else 0.0)


def run(name, trainer_class=UnlearnTrainer, retain=True, resume_run=None, **values):
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
    ))
    settings = {"per_device_train_batch_size": 4 // processes, "isotropic_weight": 0.1, "fisher_weight": 0.5} | values
    trainer = trainer_class(
        model, arguments(folder / (resume_run or name), **settings), forget_dataset=images(8, [3]),
        eval_dataset={"retain": images(9, [0, 1, 2], seed=2)},
        **({"retain_dataset": images(6, [0, 1], seed=1)} if retain else {}),
    )
    try:
        trainer.train(resume_from_checkpoint=bool(resume_run))
        trainer.save_model(folder / name / "saved")
        error = None
    except FloatingPointError as raised:
        error = str(raised)
    rank = trainer.args.process_index
    save_file({k: v.clone() for k, v in model.state_dict().items()}, folder / f"{name}-{rank}.safetensors")
    (folder / f"{name}-{rank}.json").write_text(json.dumps({
        "guard": trainer.guard and trainer.guard.state.to_json(), "error": error, "step": trainer.state.global_step,
        "retained": list(getattr(trainer, "retained", ())),
        "logs": [{k: v for k, v in log.items() if "forget" in k} for log in trainer.state.log_history],
    }))


loud = {"logging_strategy": "steps", "logging_steps": 1}
run("plain", max_steps=4, max_grad_norm=1.0, **loud)
run("accumulated", max_steps=2, per_device_train_batch_size=2 // processes, gradient_accumulation_steps=2)
run("deterministic replay", Deterministic, retain=False, replay_weight=2.0)
run("pairs", Recorder, max_steps=-1, num_train_epochs=8, learning_rate=1e-3)
run("replay", retain=False, replay_weight=2.0)
run("statistics", replay_weight=1.0, bn="train")
guarded = {
    "replay_weight": 1.0, "guard": True, "guard_steps": 1, "guard_patience": 2, "forget_loss": "ascent", "max_steps": 12,
    "optim": "adamw_torch", "learning_rate": 0.02, "save_strategy": "steps", "save_steps": 2,
}
run("guard", **guarded)
run("resumed", resume_run="guard", **guarded)
run("broken", BrokenOnOne, guard=True, forget_loss="ascent", max_steps=10)
print("all done", flush=True)
'''


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of the two processes' runs, and of the one process's."""
    root = tmp_path_factory.mktemp("distributed")
    (root / "driver.py").write_text(DRIVER)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    folders = [root / "two", root / "one"]
    for folder in folders:
        folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(root / "driver.py"), str(folders[0]), "2"]
    # A process that waits for another for ever is what the time limit is for.
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, "\n".join(line for line in run.stderr.splitlines() if "rank0" in line)[-3000:]
    assert run.stdout.count("all done") == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["driver.py", str(folders[1]), "1"])
        runpy.run_path(str(root / "driver.py"))
    return folders


def end(folder, name, rank=0):
    return load_file(folder / f"{name}-{rank}.safetensors"), json.loads((folder / f"{name}-{rank}.json").read_text())


NAMES = ["plain", "accumulated", "deterministic replay", "replay", "guard", "resumed", "broken", "pairs"]


@pytest.mark.parametrize("name", NAMES)
def test_ranks_stay_identical(name, runs):
    (first, first_notes), (second, second_notes) = (end(runs[0], name, rank) for rank in (0, 1))
    assert same(first, second)
    assert first_notes["guard"] == second_notes["guard"]
    assert first_notes["step"] == second_notes["step"]


@pytest.mark.parametrize("name", ["plain", "accumulated", "deterministic replay"])
def test_agrees_with_one_process_and_the_same_global_batch(name, runs, tmp_path):
    two, one = (end(folder, name)[0] for folder in runs)
    start = load_file(runs[1] / name / "_private" / "reference.safetensors")
    start = {key.split("/", 1)[1]: value for key, value in start.items()}
    assert distance(two, one) < 1e-4 * distance(start, one)


def test_logged_terms_are_means_over_the_processes(runs):
    two, one = (end(folder, "plain")[1]["logs"] for folder in runs)
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        assert first == pytest.approx(second, rel=1e-4)
    assert any("forget_loss" in log for log in one)


def test_pairs_change_from_epoch_to_epoch_and_reach_every_row(runs):
    seen = [end(runs[0], "pairs", rank)[1]["retained"] for rank in (0, 1)]
    assert len(set(seen[0]) | set(seen[1])) == 6
    epochs = [tuple(seen[0][start : start + 4]) for start in range(0, len(seen[0]), 4)]
    assert len({tuple(sorted(epoch)) for epoch in epochs}) > 1


def test_the_guard_stops_and_restores_on_all(runs):
    weights, notes = end(runs[0], "guard", 1)
    guard = notes["guard"]
    assert guard["best"]["step"] < notes["step"] < 12
    file = Path(runs[0], "guard", "_private", "guard", f"step-{guard['best']['step']}.safetensors")
    saved = {key.split("/", 1)[1]: value for key, value in load_file(file).items()}
    assert same(weights, saved)


def test_a_resumed_run_ends_where_the_first_did(runs):
    for folder in runs:
        (first, first_notes), (second, second_notes) = (end(folder, name) for name in ("guard", "resumed"))
        assert same(first, second)
        assert first_notes["guard"]["looks"] == second_notes["guard"]["looks"]


def test_what_is_saved_is_the_model(runs):
    weights, _ = end(runs[0], "plain")
    assert same(load_file(runs[0] / "plain" / "saved" / "model.safetensors"), weights)


def test_a_loss_that_is_infinite_on_one_stops_all(runs):
    for folder, ranks in zip(runs, (2, 1), strict=True):
        for rank in range(ranks):
            weights, notes = end(folder, "broken", rank)
            assert "not finite at step 3" in notes["error"]
            assert notes["step"] == 2
            assert all(torch.isfinite(value).all() for value in weights.values())
