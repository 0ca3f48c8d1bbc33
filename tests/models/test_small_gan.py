"""Small GANs that are trained on first use: seeded, complete or not there, and nobody else's randomness."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_unlearn import GANPipeline, files
from hf_unlearn.examples import cache
from hf_unlearn.examples import gan as small_gan
from hf_unlearn.examples.gan import Recipe, cached, train, untrained
from hf_unlearn.images import grey_images


TINY = Recipe("digits", size=8, base_channels=4, steps=3, latent_dim=4)
WEIGHTS = "generator/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pictures(digits):
    return grey_images(digits["train"].select(range(40)), 8)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hf_unlearn"


class TestTrain:
    def test_the_same_twice(self, pictures, tmp_path):
        train(TINY, pictures, tmp_path / "a", progress=False)
        torch.manual_seed(99)
        train(TINY, pictures, tmp_path / "b", progress=False)
        train(replace(TINY, seed=1), pictures, tmp_path / "c", progress=False)
        first, second, other = ((tmp_path / name / WEIGHTS).read_bytes() for name in "abc")
        assert first == second
        assert first != other

    def test_nobody_else_s_randomness(self, pictures, tmp_path):
        torch.manual_seed(123)
        np.random.seed(123)
        random.seed(123)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        untrained(TINY)
        assert torch.get_rng_state().equal(before[0])
        train(TINY, pictures, tmp_path / "model", progress=False)
        assert torch.get_rng_state().equal(before[0])
        np.testing.assert_array_equal(np.random.get_state()[1], before[1])
        assert random.getstate() == before[2]

    def test_what_is_left(self, pictures, tmp_path):
        folder = train(TINY, pictures, tmp_path / "new" / "model", progress=False)
        assert folder == tmp_path / "new" / "model"
        assert [path.name for path in folder.parent.iterdir()] == ["model"]  # nothing half-made beside it
        assert {path.name for path in folder.iterdir()} == {
            "discriminator", "generator", "model_index.json", "recipe.json",
        }  # fmt: skip
        pipe = GANPipeline.from_pretrained(folder)
        assert pipe(2, output_type="np").images.shape == (2, 8, 8, 1)
        assert pipe.discriminator is not None

    def test_is_trained(self, pictures, tmp_path):
        """Digits are dark, what an untrained generator draws is grey."""
        latents = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
        folder = train(replace(TINY, steps=40, base_channels=8), pictures, tmp_path / "model", progress=False)
        before = untrained(replace(TINY, base_channels=8)).draw(latents)
        after = GANPipeline.from_pretrained(folder).draw(latents)
        assert (after.mean() - pictures.mean()).abs() < 0.5 * (before.mean() - pictures.mean()).abs()

    def test_a_training_that_fails_leaves_nothing(self, tmp_path):
        with pytest.raises(ValueError, match="train_dataset"):
            train(TINY, torch.zeros(4, 3, 8, 8), tmp_path / "model", progress=False)
        assert list(tmp_path.iterdir()) == []

    def test_a_kill_in_the_middle_leaves_nothing(self, pictures, tmp_path, monkeypatch):
        """The weights are written, the recipe is not."""

        def stop(recipe, folder):
            assert (folder / WEIGHTS).is_file()
            raise KeyboardInterrupt

        monkeypatch.setattr(cache, "write_recipe", stop)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, pictures, tmp_path / "model", progress=False)
        assert list(tmp_path.iterdir()) == []

    def test_another_process_that_was_faster_wins(self, pictures, tmp_path):
        folder = train(TINY, pictures, tmp_path / "model", progress=False)
        before = (folder / WEIGHTS).read_bytes()
        train(replace(TINY, seed=1), pictures, folder, progress=False)
        assert (folder / WEIGHTS).read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


class TestCached:
    def test_trained_once(self, home, monkeypatch):
        folder = cached(TINY, progress=False)
        assert folder == home / "digits-gan-0"
        assert json.loads((folder / "recipe.json").read_text())["steps"] == 3
        monkeypatch.setattr(small_gan, "train", None)
        assert cached(TINY, progress=False) == folder

    def test_another_recipe_is_trained_anew(self, home):
        before = (cached(TINY, progress=False) / WEIGHTS).read_bytes()
        folder = cached(replace(TINY, steps=2), progress=False)
        assert folder == home / "digits-gan-0"
        assert (folder / WEIGHTS).read_bytes() != before
        assert json.loads((folder / "recipe.json").read_text())["steps"] == 2

    def test_another_seed_stands_beside_it(self, home):
        first, second = cached(TINY, progress=False), cached(replace(TINY, seed=1), progress=False)
        assert sorted(path.name for path in home.iterdir()) == ["digits-gan-0", "digits-gan-1"]
        assert (first / WEIGHTS).read_bytes() != (second / WEIGHTS).read_bytes()

    def test_a_folder_without_its_recipe_is_made_anew(self, home):
        """What an older version or a person left there is no model of this recipe."""
        folder = cached(TINY, progress=False)
        expected = (folder / WEIGHTS).read_bytes()
        (folder / "recipe.json").unlink()
        (folder / WEIGHTS).write_bytes(b"of something else")
        assert (cached(TINY, progress=False) / WEIGHTS).read_bytes() == expected
        assert (folder / "recipe.json").is_file()

    def test_without_a_class(self, home, monkeypatch, digits):
        seen = {}

        def look(recipe, images, folder, *, progress):
            seen[Path(folder).name] = images

        monkeypatch.setattr(small_gan, "train", look)
        cached(TINY, progress=False)
        cached(TINY, without=3, progress=False)
        kept = [row for row, label in enumerate(digits["train"]["label"]) if label != 3]
        assert set(seen) == {"digits-gan-0", "digits-gan-0-without-3"}
        assert seen["digits-gan-0"].equal(grey_images(digits["train"], 8))
        assert seen["digits-gan-0-without-3"].equal(grey_images(digits["train"].select(kept), 8))

    def test_in_the_home_folder_by_default(self, tmp_path, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr(small_gan, "train", lambda *args, **kwargs: None)
        assert cached(TINY) == tmp_path / ".cache/hf_unlearn/digits-gan-0"
        monkeypatch.setenv("XDG_CACHE_HOME", "")  # empty counts as unset
        assert cache.cache_dir() == tmp_path / ".cache/hf_unlearn"

    def test_names(self):
        assert {name: recipe.dataset for name, recipe in small_gan.NAMES.items()} == {
            "digits-gan": "digits", "fashion-mnist-gan": "fashion_mnist",
        }  # fmt: skip


class TestCompleteOrNotThere:
    def test_there_at_the_end_only(self, tmp_path):
        with files.complete_or_not_there(tmp_path / "deep" / "model") as scratch:
            (scratch / "file").write_text("x")
            assert not (tmp_path / "deep" / "model").exists()
        assert (tmp_path / "deep" / "model" / "file").read_text() == "x"
        assert len(list((tmp_path / "deep").iterdir())) == 1

    def test_a_place_that_is_taken_by_a_file(self, tmp_path):
        (tmp_path / "model").write_text("mine")
        with pytest.raises(OSError), files.complete_or_not_there(tmp_path / "model") as scratch:  # noqa: PT012
            (scratch / "file").write_text("x")
        assert (tmp_path / "model").read_text() == "mine"
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
