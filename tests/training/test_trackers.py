"""Trackers of a run get its terms, looks and pictures; read back from what they wrote."""

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fresh import run_python
from image_data import arguments as classifier_arguments
from image_data import images as labelled_images
from PIL import Image
from transformers.integrations import TrackioCallback, WandbCallback
from vdu_data import arguments, images

from hf_unlearn import (
    DCGANDiscriminator,
    DCGANGenerator,
    GANConfig,
    GANPipeline,
    GANTrainer,
    UnlearnTrainer,
    VDUTrainer,
)
from hf_unlearn.training.pictures import PULCallback, SampleGrids
from hf_unlearn.training.trackers import Trackers, log_beside


def darkness(pictures):
    return (pictures.flatten(1).mean(1) < 0).long()


@pytest.fixture
def board(tmp_path, monkeypatch):
    """Where TensorBoard writes, and what it wrote."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))

    def read():
        events = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0, "scalars": 0})
        return events.Reload()

    return SimpleNamespace(folder=tmp_path / "board", read=read)


def scalars(events, name):
    return [(event.step, event.value) for event in events.Scalars(name)]


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def assert_looks(events, looks):
    """What the guard saw, but for what is not known: how far from a target that there is not."""
    assert looks
    for name in ("remembered", "utility_drop"):
        expected = [(look.step, getattr(look, name)) for look in looks if math.isfinite(getattr(look, name))]
        tag = f"train/guard_{name}"
        found = scalars(events, tag) if expected else [tag for tag in events.Tags()["scalars"] if tag.endswith(name)]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected])


LOOKS = {
    "grid_images": 4,
    "grid_steps": 1,
    "guard": True,
    "guard_steps": 1,
    "utility_tolerance": 1e9,
    "logging_steps": 1,
}


class TestTensorBoard:
    def test_terms_looks_and_grids_of_vdu(self, tiny_ddpm, tmp_path, board):
        args = arguments(tmp_path / "out", report_to="tensorboard", max_steps=2, logging_strategy="steps", **LOOKS)
        trainer = VDUTrainer(pipeline=tiny_ddpm, args=args, forget_dataset=images())
        trainer.add_callback(PULCallback(trainer, darkness, [0], samples=8, steps=1))
        trainer.train()
        events = board.read()
        files = [path for path in board.folder.rglob("*") if path.is_file()]
        assert len(files) == 1  # nothing was written after the end into another
        assert [step for step, _ in scalars(events, "train/loss")] == [1, 2]
        for term in ("train/forget_loss", "train/replay_loss"):
            assert [step for step, _ in scalars(events, term)] == [1, 2], term
        assert [step for step, _ in scalars(events, "train/pul")] == [1, 2, 2]
        assert_looks(events, trainer.guard.looks)
        shown = events.Images("train/samples")
        private = tmp_path / "out/_private/samples"
        names = ["before", "step-1", "step-2", "after"]
        assert [image.step for image in shown] == [0, 1, 2, 2]
        for image, name in zip(shown, names, strict=True):
            assert np.array_equal(pixels(image.encoded_image_string), np.asarray(Image.open(private / f"{name}.png")))
        assert not [log for log in trainer.state.log_history if "guard_remembered" in log]

    def test_a_classifier(self, tiny_resnet, tmp_path, board):
        settings = {"guard": True, "guard_steps": 1, "max_steps": 2, "logging_strategy": "steps", "logging_steps": 1}
        args = classifier_arguments(tmp_path / "out", report_to="tensorboard", **settings)
        trainer = UnlearnTrainer(tiny_resnet, args, forget_dataset=labelled_images(8, [3]))
        trainer.train()
        assert math.isfinite(trainer.guard.looks[0].remembered)
        events = board.read()
        assert_looks(events, trainer.guard.looks)
        assert [step for step, _ in scalars(events, "train/forget_loss")] == [1, 2]

    def test_a_gan_and_a_second_run(self, tmp_path, board):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            shape = {"sample_size": 8, "base_channels": 4}
            pipeline = GANPipeline(DCGANGenerator(latent_dim=4, **shape), DCGANDiscriminator(**shape))
        args = GANConfig(
            str(tmp_path / "out"), report_to="tensorboard", max_steps=2, guard_steps=1, logging_steps=1, use_cpu=True,
            per_device_train_batch_size=4, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        args.grid_steps, args.grid_images, args.publish_before = None, 4, False
        trainer = GANTrainer(pipeline, args, train_dataset=torch.rand(12, 1, 8, 8) * 2 - 1)
        trainer.as_original = lambda: torch.no_grad()
        trainer.add_callback(SampleGrids(trainer))
        for run in (1, 2):
            trainer.train()
            events = board.read()
            looks = [(look.step, pytest.approx(look.coverage)) for look in trainer.guard.looks[-3:]]
            assert scalars(events, "train/guard_coverage")[-3:] == looks
            assert [image.step for image in events.Images("train/samples")] == [0, 2] * run
            assert [step for step, _ in scalars(events, "train/discriminator_loss")] == [1, 2] * run


def test_without_trackers_nothing_changes(tiny_ddpm, tmp_path):
    args = arguments(tmp_path / "out", max_steps=1, **LOOKS)
    trainer = VDUTrainer(pipeline=tiny_ddpm, args=args, forget_dataset=images())
    before = [*trainer.callback_handler.callbacks]
    trainer.train()
    assert trainer.trackers.active == []
    assert trainer.callback_handler.callbacks == before


def test_what_is_logged_beside_leaves_the_losses_their_turn():
    heard = []
    control = SimpleNamespace(should_log=True)

    def log(figures):
        heard.append(figures)
        control.should_log = False  # as transformers does

    log_beside(SimpleNamespace(control=control, log=log), {"fid": 1.0})
    assert (heard, control.should_log) == ([{"fid": 1.0}], True)


RUN = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
from building import build
from vdu_data import arguments, images
from diffusers import DDPMPipeline
from hf_unlearn import VDUTrainer
args = arguments(sys.argv[3], report_to=TRACKER, max_steps=2, project="forget", run_name="one", logging_strategy="steps",
                 **json.loads(sys.argv[4]))
trainer = VDUTrainer(pipeline=DDPMPipeline.from_pretrained(sys.argv[2]), args=args, forget_dataset=images())
trainer.train()
"""
WANDB = RUN.replace("TRACKER", "'wandb'")
TRACKIO = (
    RUN.replace("TRACKER", "'trackio'")
    + """
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps({"runs": SQLiteStorage.get_runs("forget"), "logs": SQLiteStorage.get_logs("forget", "one")}, default=str))
"""
)


@pytest.mark.slow
def test_trackio(tiny_ddpm, tmp_path):
    pytest.importorskip("trackio")
    tiny_ddpm.save_pretrained(tmp_path / "ddpm")
    tests = Path(__file__).parents[1]
    path = json.dumps([str(tests), str(tests / "unlearning")])
    env = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    out = run_python(TRACKIO, path, tmp_path / "ddpm", tmp_path / "out", json.dumps(LOOKS), env=env).stdout
    found = json.loads(out.splitlines()[-1])
    assert found["runs"] == ["one"]
    logs = found["logs"]
    assert sum("train/loss" in log for log in logs) == 2
    assert sum("train/guard_utility_drop" in log for log in logs) == 3
    assert [log["train/global_step"] for log in logs if "train/samples" in log] == [0, 1, 2, 2]
    pictures = [np.asarray(Image.open(file).convert("RGB")) for file in (tmp_path / "trackio").rglob("*.png")]
    expected = np.asarray(Image.open(tmp_path / "out/pictures/after.png"))
    assert len(pictures) == 4
    assert any(np.array_equal(picture, expected) for picture in pictures)


@pytest.mark.slow
def test_wandb_offline(tiny_ddpm, tmp_path):
    pytest.importorskip("wandb")
    tiny_ddpm.save_pretrained(tmp_path / "ddpm")
    tests = Path(__file__).parents[1]
    path = json.dumps([str(tests), str(tests / "unlearning")])
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true", "HF_HUB_OFFLINE": "1"}
    run_python(WANDB, path, tmp_path / "ddpm", tmp_path / "out", json.dumps(LOOKS), env=env)
    pictures = [
        np.asarray(Image.open(file).convert("RGB"))
        for file in tmp_path.glob("wandb/offline-run-*/files/media/**/*.png")
    ]
    expected = np.asarray(Image.open(tmp_path / "out/pictures/after.png"))
    assert len(pictures) == 4
    assert any(np.array_equal(picture, expected) for picture in pictures)


@pytest.mark.parametrize(("kind", "mode", "space", "shown"), [
    (WandbCallback, "", None, ["after"]),
    (WandbCallback, "offline", None, ["before", "after"]),
    (TrackioCallback, "", None, ["before", "after"]),
    (TrackioCallback, "", "me/space", ["after"]),
])  # fmt: skip
def test_what_is_private_leaves_the_machine_for_no_tracker(kind, mode, space, shown, monkeypatch):
    """By the calls that both libraries take alike: `Image(picture, caption=…)` and `log({name: …})`."""
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.delenv("TRACKIO_SERVER_URL", raising=False)
    logged = []
    module = SimpleNamespace(Image=lambda image, caption: (image.size, caption), log=logged.append)
    tracker = object.__new__(kind)
    tracker._wandb = tracker._trackio = module
    tracker._space_id = space
    state = SimpleNamespace(global_step=3, is_world_process_zero=True)
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[tracker]), state=state)
    for name, private in (("before", True), ("after", False)):
        Trackers(trainer).picture(name, Image.new("L", (4, 2)), private=private)
    assert logged == [{f"train/{name}": ((4, 2), "step 3"), "train/global_step": 3} for name in shown]
