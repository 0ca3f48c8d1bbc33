"""Small diffusion models that are trained on first use: seeded, complete or not there, with the checkpoints of their run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from safetensors.torch import load_file

from hf_unlearn.examples import ddpm as small_ddpm
from hf_unlearn.examples.ddpm import Recipe, cached, train
from hf_unlearn.images import grey_images
from hf_unlearn.training.noise import NoiseSchedule


TINY = Recipe("digits", size=8, channels=(16, 16), steps=8, checkpoints=2)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pictures(digits):
    return grey_images(digits["train"].select(range(40)), 8)


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory):
    """A trained model, alone in a folder that was not there. Not to be changed."""
    before = torch.get_rng_state()
    folder = tmp_path_factory.mktemp("trained") / "new" / "model"
    assert train(TINY, pictures, folder, progress=False) == folder
    assert torch.get_rng_state().equal(before)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hf_unlearn"


def error(unet, pictures):
    """Of its guesses of the noise in the middle of the time; a guess of zero has 1. With the guesses."""
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.full((len(pictures),), 500)
    noisy = NoiseSchedule.of(DDIMScheduler()).add_noise(pictures, noise, timesteps)
    with torch.no_grad():
        answer = unet.eval()(noisy, timesteps).sample
    return (answer - noise).square().mean().item(), answer


class TestTrain:
    def test_the_same_twice_whatever_the_global_randomness(self, folder, pictures, tmp_path):
        torch.manual_seed(99)
        train(TINY, pictures, tmp_path / "again", progress=False)
        train(replace(TINY, seed=1), pictures, tmp_path / "other", progress=False)
        answers = [
            error(UNet2DModel.from_pretrained(path / "unet"), pictures)[1]
            for path in (folder, tmp_path / "again", tmp_path / "other")
        ]
        # Not bit by bit: sums may depend on where in memory they lie, and Adam makes whole steps of rounding errors.
        torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=1e-2)
        assert (answers[2] - answers[0]).abs().max() > 0.1

    def test_what_is_left(self, folder):
        assert [path.name for path in folder.parent.iterdir()] == ["model"]  # nothing half-made beside it
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
        ends = [load_file(path / WEIGHTS) for path in (folder, folder / "checkpoint-6", folder / "checkpoint-8")]
        assert len({end["conv_in.weight"].numpy().tobytes() for end in ends}) == 3  # an average, and two steps
        UNet2DModel.from_pretrained(folder / "checkpoint-8" / "unet")
        pipeline = DDPMPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)

    def test_it_learns(self, folder, pictures):
        with torch.random.fork_rng(devices=[]):
            before, _ = error(small_ddpm.untrained(TINY).unet, pictures)
        after, _ = error(UNet2DModel.from_pretrained(folder / "checkpoint-8" / "unet"), pictures)
        assert after < 0.5 < 0.9 < before  # 0.21 ± 0.01 over 6 seeds, and 1.03

    def test_a_training_that_fails_leaves_nothing(self, tmp_path):
        with pytest.raises(RuntimeError):
            train(TINY, torch.zeros(4, 3, 8, 8), tmp_path / "model", progress=False)
        assert list(tmp_path.iterdir()) == []

    def test_another_process_that_was_faster_wins(self, folder, pictures):
        before = (folder / WEIGHTS).read_bytes()
        train(replace(TINY, seed=1, steps=2), pictures, folder, progress=False)
        assert (folder / WEIGHTS).read_bytes() == before
        assert [path.name for path in folder.parent.iterdir()] == ["model"]


class TestCached:
    def test_trained_once_for_each_recipe(self, cache, monkeypatch):
        folder, train = cached(TINY, progress=False), small_ddpm.train
        assert folder == cache / "digits-ddpm-0"
        assert json.loads((folder / "recipe.json").read_text())["steps"] == 8
        before = (folder / WEIGHTS).read_bytes()
        monkeypatch.setattr(small_ddpm, "train", None)
        assert cached(TINY, progress=False) == folder
        monkeypatch.setattr(small_ddpm, "train", train)
        assert cached(replace(TINY, steps=4), progress=False) == folder
        assert (folder / WEIGHTS).read_bytes() != before
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]

    def test_without_a_class(self, cache, monkeypatch, digits):
        seen = {}

        def look(recipe, images, folder, **_):
            seen[Path(folder).name] = images
            Path(folder).mkdir(parents=True)

        monkeypatch.setattr(small_ddpm, "train", look)
        cached(TINY, progress=False)
        cached(TINY, without=3, progress=False)
        kept = [row for row, label in enumerate(digits["train"]["label"]) if label != 3]
        assert set(seen) == {"digits-ddpm-0", "digits-ddpm-0-without-3"}
        assert seen["digits-ddpm-0"].shape == (1077, 1, 8, 8)
        assert seen["digits-ddpm-0-without-3"].equal(grey_images(digits["train"].select(kept), 8))

    def test_names(self):
        names = {name: recipe.dataset for name, recipe in small_ddpm.NAMES.items()}
        assert names == {"digits-ddpm": "digits", "fashion-mnist-ddpm": "fashion_mnist"}
