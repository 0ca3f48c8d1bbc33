"""`GANPipeline`: what is saved is what is loaded, here and in a new process; drawing depends on the latents alone."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from gan_data import own_images, pipeline, same, style_pipeline, weights

from hf_unlearn import DCGANDiscriminator, DCGANGenerator, GANPipeline


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class TestSaved:
    @pytest.mark.parametrize("norm", ["pixel", "batch"])
    def test_round_trip(self, tmp_path, norm):
        pipe = pipeline(norm=norm, channels=3)
        pipe.generator.train()(noise(8, 4))
        pipe.save_pretrained(tmp_path)
        loaded = GANPipeline.from_pretrained(tmp_path)
        assert isinstance(loaded.generator, DCGANGenerator)
        assert isinstance(loaded.discriminator, DCGANDiscriminator)
        assert same(weights(pipe.generator), weights(loaded.generator))
        assert same(weights(pipe.discriminator), weights(loaded.discriminator))
        assert loaded.draw(noise(3, 4)).equal(pipe.draw(noise(3, 4)))

    def test_the_index_names_this_library(self, tmp_path):
        pipeline().save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["generator"] == ["hf_unlearn", "DCGANGenerator"]
        assert index["discriminator"] == ["hf_unlearn", "DCGANDiscriminator"]

    def test_in_a_new_process(self, tmp_path):
        pipe = pipeline()
        pipe.save_pretrained(tmp_path / "model")
        code = (
            "from hf_unlearn import GANPipeline; import sys, torch; pipe = GANPipeline.from_pretrained(sys.argv[1]); "
            "images = pipe(3, torch.Generator().manual_seed(0), output_type='pt').images; "
            "torch.save((images, pipe.discriminator(images).logits), sys.argv[2])"
        )
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "drawn.pt")]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr[-2000:]
        drawn, judged = torch.load(tmp_path / "drawn.pt")
        expected = pipe(3, seeded(), output_type="pt").images
        torch.testing.assert_close(drawn, expected)
        torch.testing.assert_close(judged, pipe.discriminator(expected).logits)

    def test_without_a_discriminator(self, tmp_path):
        pipe = GANPipeline(pipeline().generator)
        assert pipe.discriminator is None
        pipe.save_pretrained(tmp_path)
        assert not (tmp_path / "discriminator").exists()
        loaded = GANPipeline.from_pretrained(tmp_path)
        assert loaded.discriminator is None
        assert loaded.draw(noise(2, 4)).equal(pipe.draw(noise(2, 4)))

    def test_left_out_when_loaded(self, tmp_path):
        pipeline().save_pretrained(tmp_path)
        assert GANPipeline.from_pretrained(tmp_path, discriminator=None).discriminator is None

    def test_a_generator_from_elsewhere(self, tmp_path):
        pipe = style_pipeline()
        pipe.generator.mean_style.fill_(0.5)
        pipe.save_pretrained(tmp_path)
        loaded = GANPipeline.from_pretrained(tmp_path)
        assert loaded.draw(noise(3, 2, 3), truncation=0.5).equal(pipe.draw(noise(3, 2, 3), truncation=0.5))


class TestDraw:
    @pytest.mark.parametrize("make", [pipeline, lambda: pipeline(norm="batch"), style_pipeline])
    @pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
    def test_batches_do_not_matter(self, make, batch_size):
        pipe = make()
        latents = noise(7, *pipe.generator.latent_shape)
        drawn = pipe.draw(latents, batch_size=batch_size)
        torch.testing.assert_close(drawn, pipe.draw(latents), rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(drawn, pipe.generator.eval()(latents).sample, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("make", [lambda: pipeline(norm="batch"), style_pipeline])
    def test_changes_nothing(self, make):
        """Neither the statistics that training keeps nor a module's mode, and not that of one alone in eval mode."""
        pipe = make()
        pipe.generator.train()
        frozen = next(iter(pipe.generator.children())).eval()
        before, random = weights(pipe.generator), torch.get_rng_state()
        images = pipe.draw(noise(5, *pipe.generator.latent_shape))
        assert same(before, weights(pipe.generator))
        assert torch.get_rng_state().equal(random)
        still = set(frozen.modules())
        assert all(module.training == (module not in still) for module in pipe.generator.modules())
        assert not images.requires_grad

    def test_modes_come_back_where_it_fails(self):
        pipe = pipeline()
        pipe.generator.train()
        with pytest.raises(TypeError):
            pipe.draw(noise(2, 4), truncation="a little")
        assert all(module.training for module in pipe.generator.modules())

    def test_half_precision_comes_out_whole(self):
        drawn = pipeline(dtype=torch.bfloat16).draw(noise(2, 4))
        assert drawn.dtype == torch.float32
        torch.testing.assert_close(drawn, pipeline().draw(noise(2, 4)), rtol=0, atol=0.05)

    @pytest.mark.parametrize("shape", [(3, 5), (4,), (3, 4, 1), (0, 4)])
    def test_latents_of_another_shape(self, shape):
        for draw in (pipeline().draw, lambda latents: pipeline()(latents=latents)):
            with pytest.raises(ValueError) as error:
                draw(torch.zeros(shape))
            assert str(error.value) == f"latents: have shape {list(shape)}, must be [n, 4]"

    def test_the_shape_of_two_axes_is_named(self):
        with pytest.raises(ValueError, match=r"must be \[n, 2, 3\]$"):
            style_pipeline().draw(torch.zeros(4, 3))

    def test_truncation_draws_toward_the_mean_style(self):
        pipe = style_pipeline()
        pipe.generator.mean_style.copy_(noise(5))
        latents = noise(4, 2, 3)
        with torch.no_grad():
            w = pipe.generator.mapping(latents.flatten(1))
            mean = pipe.generator.mean_style
            expected = pipe.generator.synthesize((mean + 0.4 * (w - mean))[:, None].expand(-1, 2, -1))
        torch.testing.assert_close(pipe.draw(latents, truncation=0.4), expected)
        still = pipe.draw(latents, truncation=0.0)
        torch.testing.assert_close(still, still[:1].expand_as(still))


class TestCall:
    @pytest.mark.parametrize("make", [pipeline, style_pipeline])
    def test_same_seed_same_images(self, make):
        pipe = make()
        first, second, other = (pipe(4, seeded(s), output_type="pt").images for s in (1, 1, 2))
        assert first.equal(second)
        assert not first.equal(other)
        expected = torch.randn(4, *pipe.generator.latent_shape, generator=seeded(1))
        torch.testing.assert_close(first, (pipe.draw(expected) + 1) / 2)

    def test_the_global_seed_where_none_is_given(self):
        pipe = pipeline()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            first, next_one = (pipe(2, output_type="pt").images for _ in range(2))
            torch.manual_seed(5)
            assert pipe(2, output_type="pt").images.equal(first)
        assert not first.equal(next_one)

    def test_latents_given(self):
        pipe = pipeline()
        images = pipe(latents=noise(3, 4), truncation=0.5, output_type="pt").images
        torch.testing.assert_close(images, (pipe.draw(0.5 * noise(3, 4)) + 1) / 2)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_output_types_agree(self, channels):
        pipe = pipeline(channels=channels)
        pt, array, pil = (pipe(5, seeded(), output_type=kind).images for kind in ("pt", "np", "pil"))
        assert (pt.shape, array.shape, len(pil)) == ((5, channels, 8, 8), (5, 8, 8, channels), 5)
        assert 0 <= pt.min() < pt.max() <= 1
        np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
        assert {(image.mode, image.size) for image in pil} == {("L" if channels == 1 else "RGB", (8, 8))}
        pixels = np.stack([np.asarray(image).reshape(8, 8, channels) for image in pil])
        np.testing.assert_allclose(pixels, 255 * array, atol=0.501)

    def test_tuple(self):
        pipe = pipeline()
        (images,) = pipe(2, seeded(), output_type="pt", return_dict=False)
        assert images.equal(pipe(2, seeded(), output_type="pt").images)

    @pytest.mark.parametrize("count", [0, -1])
    def test_no_images(self, count):
        with pytest.raises(ValueError, match=f"^num_images={count}: must be ≥ 1$"):
            pipeline()(count)

    def test_image_shape(self):
        assert pipeline(channels=3, size=9).image_shape == (3, 9, 9)
        assert own_images(pipeline(channels=3, size=9), 2).shape == (2, 3, 9, 9)
