"""Small GANs that are trained on first use: seeded, complete or not there, and nobody else's randomness."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gan_data import same, same_run, weights

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
        folder = train(TINY, pictures, tmp_path / "new" / "model", progress=False)
        assert folder == tmp_path / "new" / "model"
        assert [path.name for path in folder.parent.iterdir()] == ["model"]  # nothing half-made beside it
        assert {path.name for path in folder.iterdir()} == {
            "discriminator", "generator", "model_index.json", "recipe.json",
        }  # fmt: skip
        first = GANPipeline.from_pretrained(folder)
        assert first(2, output_type="np").images.shape == (2, 8, 8, 1)
        torch.manual_seed(99)
        train(TINY, pictures, tmp_path / "b", progress=False)
        train(replace(TINY, seed=1), pictures, tmp_path / "c", progress=False)
        second, other = (weights(GANPipeline.from_pretrained(tmp_path / name).generator) for name in "bc")
        assert same_run(weights(first.generator), second)
        for another in (other, weights(untrained(TINY).generator)):
            assert not same_run(weights(first.generator), another)
        # Another process that was faster wins.
        train(replace(TINY, seed=1), pictures, folder, progress=False)
        assert same(weights(GANPipeline.from_pretrained(folder).generator), weights(first.generator))
        assert [path.name for path in folder.parent.iterdir()] == ["model"]

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

    def test_a_kill_in_the_middle_leaves_nothing(self, pictures, tmp_path, monkeypatch):
        """The weights are written, the recipe is not."""

        def stop(recipe, folder):
            assert (folder / WEIGHTS).is_file()
            raise KeyboardInterrupt

        monkeypatch.setattr(cache, "write_recipe", stop)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, pictures, tmp_path / "model", progress=False)
        assert list(tmp_path.iterdir()) == []


class TestCached:
    def test_trained_once_for_a_recipe(self, home, monkeypatch):
        """And anew for another one, for another seed beside it, and where the recipe is missing: that is somebody else's."""
        folder = cached(TINY, progress=False)
        assert folder == home / "digits-gan-0"
        made = []
        train = small_gan.train

        def look(recipe, images, folder, *, progress):
            made.append(recipe)
            return train(recipe, images[:8], folder, progress=progress)

        monkeypatch.setattr(small_gan, "train", look)
        assert cached(TINY, progress=False) == folder
        assert made == []
        (folder / "recipe.json").unlink()
        (folder / WEIGHTS).write_bytes(b"of something else")
        assert cached(TINY, progress=False) == folder
        assert GANPipeline.from_pretrained(folder).draw(torch.zeros(1, 4)).isfinite().all()
        shorter, seeded = replace(TINY, steps=2), replace(TINY, seed=1)
        assert cached(shorter, progress=False) == folder
        assert json.loads((folder / "recipe.json").read_text())["steps"] == 2
        assert cached(seeded, progress=False) == home / "digits-gan-1"
        assert sorted(path.name for path in home.iterdir()) == ["digits-gan-0", "digits-gan-1"]
        assert made == [TINY, shorter, seeded]

    def test_without_a_class(self, home, monkeypatch, digits):
        seen = {}

        def look(recipe, images, folder, *, progress):
            seen[Path(folder).name] = images
            Path(folder).mkdir(parents=True)

        monkeypatch.setattr(small_gan, "train", look)
        cached(TINY, progress=False)
        cached(TINY, without=3, progress=False)
        kept = [row for row, label in enumerate(digits["train"]["label"]) if label != 3]
        assert set(seen) == {"digits-gan-0", "digits-gan-0-without-3"}
        assert seen["digits-gan-0"].equal(grey_images(digits["train"], 8))
        assert seen["digits-gan-0-without-3"].equal(grey_images(digits["train"].select(kept), 8))

    def test_names(self):
        names = {name: recipe.dataset for name, recipe in small_gan.NAMES.items()}
        assert names == {"digits-gan": "digits", "fashion-mnist-gan": "fashion_mnist"}


def test_a_place_that_is_taken_by_a_file(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(OSError), files.complete_or_not_there(tmp_path / "model") as scratch:
        (scratch / "file").write_text("x")
    assert (tmp_path / "model").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
