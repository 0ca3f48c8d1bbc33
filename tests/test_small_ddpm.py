"""Small diffusion models that are trained on first use: seeded, complete or not there, with the checkpoints of their run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from safetensors.torch import load_file

from hf_unlearn.examples import ddpm as small_ddpm
from hf_unlearn.examples.ddpm import Recipe, cached, train
from hf_unlearn.images import grey_images


TINY = Recipe("digits", size=8, channels=(16, 16), steps=8, checkpoints=2)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pictures(digits):
    return grey_images(digits["train"].select(range(40)), 8)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hf_unlearn"


class TestImages:
    def test_are_the_data_s(self, digits):
        rows = digits["train"].select(range(3))
        tensors = grey_images(rows, 8)
        assert (tensors.shape, tensors.dtype) == ((3, 1, 8, 8), torch.float32)
        for image, tensor in zip(rows["image"], tensors, strict=True):
            np.testing.assert_allclose((tensor[0].numpy() + 1) * 127.5, np.asarray(image), atol=1e-4)

    def test_scaled(self, digits):
        assert grey_images(digits["train"].select(range(2)), 16).shape == (2, 1, 16, 16)


class TestTrain:
    def test_the_same_twice_and_nobody_else_s_randomness(self, pictures, tmp_path):
        before = torch.get_rng_state()
        train(TINY, pictures, tmp_path / "a", progress=False)
        assert torch.get_rng_state().equal(before)
        torch.manual_seed(99)
        train(TINY, pictures, tmp_path / "b", progress=False)
        train(replace(TINY, seed=1), pictures, tmp_path / "c", progress=False)
        first, second, other = ((tmp_path / name / WEIGHTS).read_bytes() for name in "abc")
        assert first == second
        assert first != other

    def test_what_is_left(self, pictures, tmp_path):
        folder = train(TINY, pictures, tmp_path / "new" / "model", progress=False)
        assert folder == tmp_path / "new" / "model"
        assert [path.name for path in folder.parent.iterdir()] == ["model"]  # nothing half-made beside it
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
        ends = [load_file(path / WEIGHTS) for path in (folder, folder / "checkpoint-6", folder / "checkpoint-8")]
        assert len({end["conv_in.weight"].numpy().tobytes() for end in ends}) == 3  # an average, and two steps
        UNet2DModel.from_pretrained(folder / "checkpoint-8" / "unet")
        pipeline = DDPMPipeline.from_pretrained(folder)
        images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
        assert images.shape == (2, 8, 8, 1)

    def test_it_learns(self, pictures, tmp_path):
        """The error on noisy digits falls below that of a guess of zero, which is 1."""
        from hf_unlearn.unlearning.diffusion.noise import NoiseSchedule

        folder = train(replace(TINY, steps=60), pictures, tmp_path / "model", progress=False)
        unet = UNet2DModel.from_pretrained(folder / "checkpoint-60" / "unet")
        schedule = NoiseSchedule.of(DDPMPipeline.from_pretrained(folder).scheduler)
        noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
        timesteps = torch.full((len(pictures),), 500)
        with torch.no_grad():
            answer = unet(schedule.add_noise(pictures, noise, timesteps), timesteps).sample
        assert (answer - noise).square().mean() < 0.8

    def test_a_training_that_fails_leaves_nothing(self, tmp_path):
        with pytest.raises(RuntimeError):
            train(TINY, torch.zeros(4, 3, 8, 8), tmp_path / "model", progress=False)
        assert list(tmp_path.iterdir()) == []

    def test_another_process_that_was_faster_wins(self, pictures, tmp_path):
        folder = train(TINY, pictures, tmp_path / "model", progress=False)
        before = (folder / WEIGHTS).read_bytes()
        train(replace(TINY, seed=1), pictures, folder, progress=False)
        assert (folder / WEIGHTS).read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


class TestCached:
    def test_trained_once(self, cache, monkeypatch):
        folder = cached(TINY, progress=False)
        assert folder == cache / "digits-ddpm-0"
        assert json.loads((folder / "recipe.json").read_text())["steps"] == 8
        monkeypatch.setattr(small_ddpm, "train", None)
        assert cached(TINY, progress=False) == folder

    def test_another_recipe_is_trained_anew(self, cache):
        before = (cached(TINY, progress=False) / WEIGHTS).read_bytes()
        folder = cached(replace(TINY, steps=4), progress=False)
        assert (folder / WEIGHTS).read_bytes() != before
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]

    def test_without_a_class(self, cache, monkeypatch, digits):
        seen = {}

        def look(recipe, images, folder, *, progress):
            seen[Path(folder).name] = images

        monkeypatch.setattr(small_ddpm, "train", look)
        cached(TINY, progress=False)
        cached(TINY, without=3, progress=False)
        kept = [row for row, label in enumerate(digits["train"]["label"]) if label != 3]
        assert set(seen) == {"digits-ddpm-0", "digits-ddpm-0-without-3"}
        assert seen["digits-ddpm-0"].shape == (1077, 1, 8, 8)
        assert seen["digits-ddpm-0-without-3"].equal(grey_images(digits["train"].select(kept), 8))

    def test_in_the_home_folder_by_default(self, tmp_path, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr(small_ddpm, "train", lambda *args, **kwargs: None)
        assert cached(TINY) == tmp_path / ".cache/hf_unlearn/digits-ddpm-0"

    def test_names(self):
        assert {name: recipe.dataset for name, recipe in small_ddpm.NAMES.items()} == {
            "digits-ddpm": "digits", "fashion-mnist-ddpm": "fashion_mnist",
        }  # fmt: skip
