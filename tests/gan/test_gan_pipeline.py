"""`GANPipeline`: what is saved is what is loaded, here and in a new process; drawing depends on the latents alone."""

import json

import numpy as np
import pytest
import torch
from fresh import run_python
from gan_data import noise, own_images, pipeline, same, style_pipeline, weights

from hf_unlearn import DCGANDiscriminator, DCGANGenerator, GANPipeline


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch_pipeline():
    return pipeline(norm="batch")


class TestSaved:
    def test_round_trip(self, tmp_path):
        shape = {"sample_size": 9, "channels": 3, "base_channels": 3, "max_channels": 5}
        settings = shape | {"latent_dim": 4, "norm": "batch"}
        pipe = GANPipeline(DCGANGenerator(**settings), DCGANDiscriminator(**shape))
        pipe.generator.train()(noise(8, 4))  # BatchNorm has statistics to keep
        pipe.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["generator"] == ["hf_unlearn", "DCGANGenerator"]
        assert index["discriminator"] == ["hf_unlearn", "DCGANDiscriminator"]
        loaded = GANPipeline.from_pretrained(tmp_path)
        assert settings.items() <= loaded.generator.config.items()
        assert shape.items() <= loaded.discriminator.config.items()
        assert not loaded.generator.training
        assert same(weights(pipe.generator), weights(loaded.generator))
        assert same(weights(pipe.discriminator), weights(loaded.discriminator))
        assert GANPipeline.from_pretrained(tmp_path, discriminator=None).discriminator is None

    def test_in_a_new_process(self, tmp_path):
        pipe = pipeline()
        pipe.save_pretrained(tmp_path / "model")
        code = (
            "from hf_unlearn import GANPipeline; import sys, torch; pipe = GANPipeline.from_pretrained(sys.argv[1]); "
            "images = pipe(3, torch.Generator().manual_seed(0), output_type='pt').images; "
            "torch.save((images, pipe.discriminator(images).logits), sys.argv[2])"
        )
        run_python(code, tmp_path / "model", tmp_path / "drawn.pt")
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
        assert same(weights(pipe.generator), weights(loaded.generator))

    def test_a_generator_from_elsewhere(self, tmp_path):
        pipe = style_pipeline()
        pipe.generator.mean_style.fill_(0.5)
        pipe.save_pretrained(tmp_path)
        loaded = GANPipeline.from_pretrained(tmp_path)
        assert same(weights(pipe.generator), weights(loaded.generator))


class TestDraw:
    @pytest.mark.parametrize(
        ("make", "batch_size"), [(pipeline, 1), (batch_pipeline, 3), (style_pipeline, 7), (style_pipeline, 2)]
    )
    def test_batches_do_not_matter(self, make, batch_size):
        pipe = make()
        latents = noise(7, *pipe.generator.latent_shape)
        with torch.no_grad():
            expected = pipe.generator.eval()(latents).sample
        torch.testing.assert_close(pipe.draw(latents, batch_size=batch_size), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("make", [batch_pipeline, style_pipeline])
    def test_changes_nothing(self, make):
        """Neither the statistics that training keeps nor a module's mode, and not that of one alone in eval mode."""
        pipe = make()
        pipe.generator.train()
        frozen = next(iter(pipe.generator.children())).eval()
        before, random = weights(pipe.generator), torch.get_rng_state()
        images = pipe.draw(noise(5, *pipe.generator.latent_shape))
        with pytest.raises(TypeError):
            pipe.draw(noise(2, *pipe.generator.latent_shape), truncation="a little")
        assert same(before, weights(pipe.generator))
        assert torch.get_rng_state().equal(random)
        still = set(frozen.modules())
        assert all(module.training == (module not in still) for module in pipe.generator.modules())
        assert not images.requires_grad

    def test_half_precision_comes_out_whole(self):
        drawn = pipeline(dtype=torch.bfloat16).draw(noise(2, 4))
        assert drawn.dtype == torch.float32
        # tanh of three layers, each rounded twice by 2⁻⁹ of values up to 2
        torch.testing.assert_close(drawn, pipeline().draw(noise(2, 4)), rtol=0, atol=0.05)

    def test_what_leaves_the_range_is_cut(self, monkeypatch):
        pipe = style_pipeline()
        monkeypatch.setattr(pipe.generator, "synthesize", lambda styles: torch.full((len(styles), 1, 8, 8), 1.5))
        assert (pipe.draw(noise(2, 2, 3)) == 1).all()

    @pytest.mark.parametrize("shape", [(3, 5), (4,), (3, 4, 1), (0, 4)])
    def test_latents_of_another_shape(self, shape):
        for draw in (pipeline().draw, lambda latents: pipeline()(latents=latents)):
            with pytest.raises(ValueError) as error:
                draw(torch.zeros(shape))
            assert str(error.value) == f"latents: have shape {list(shape)}, must be [n, 4]"
        with pytest.raises(ValueError, match=r"must be \[n, 2, 3\]$"):
            style_pipeline().draw(torch.zeros(shape))

    def test_truncation_draws_toward_the_mean_style(self):
        pipe = style_pipeline()
        pipe.generator.mean_style.copy_(noise(5))
        latents = noise(4, 2, 3)
        with torch.no_grad():
            w, mean = pipe.generator.mapping(latents.flatten(1)), pipe.generator.mean_style
            expected = pipe.generator.synthesize((mean + 0.4 * (w - mean))[:, None].expand(-1, 2, -1))
        torch.testing.assert_close(pipe.draw(latents, truncation=0.4), expected)
        drawn = pipe(latents=latents, truncation=0.4, output_type="pt").images
        torch.testing.assert_close(drawn, (expected + 1) / 2)


class TestCall:
    @pytest.mark.parametrize("make", [pipeline, style_pipeline])
    def test_same_seed_same_images(self, make):
        pipe = make()
        first, second, other = (pipe(4, seeded(s), output_type="pt").images for s in (1, 1, 2))
        torch.testing.assert_close(first, second)
        assert not torch.allclose(first, other)
        torch.testing.assert_close(first, (pipe.draw(noise(4, *pipe.generator.latent_shape, seed=1)) + 1) / 2)

    def test_the_global_seed_where_none_is_given(self):
        pipe = pipeline()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            first, next_one = (pipe(2, output_type="pt").images for _ in range(2))
            torch.manual_seed(5)
            torch.testing.assert_close(pipe(2, output_type="pt").images, first)
        assert not torch.allclose(first, next_one)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_output_types_agree(self, channels):
        pipe = pipeline(channels=channels)
        pt, array, pil = (pipe(5, seeded(), output_type=kind).images for kind in ("pt", "np", "pil"))
        assert (pt.shape, array.shape, len(pil)) == ((5, channels, 8, 8), (5, 8, 8, channels), 5)
        assert 0 <= pt.min() < pt.max() <= 1
        np.testing.assert_allclose(array, pt.permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-6)
        assert {(image.mode, image.size) for image in pil} == {("L" if channels == 1 else "RGB", (8, 8))}
        pixels = np.stack([np.asarray(image).reshape(8, 8, channels) for image in pil])
        np.testing.assert_allclose(pixels, 255 * array, atol=0.501)
        (images,) = pipe(5, seeded(), output_type="pt", return_dict=False)
        torch.testing.assert_close(images, pt)

    def test_no_images(self):
        with pytest.raises(ValueError, match="^num_images=0: must be ≥ 1$"):
            pipeline()(0)


def test_image_shape():
    assert pipeline(channels=3, size=9).image_shape == (3, 9, 9)
    assert own_images(pipeline(channels=3, size=9), 2).shape == (2, 3, 9, 9)
