"""DCGAN: every size has the right shapes, second implementations agree, and both players survive being saved."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from gan_data import pipeline, same, weights

from hf_unlearn import DCGANDiscriminator, DCGANGenerator
from hf_unlearn.gan.dcgan import PixelNorm, resolutions


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestShapes:
    @pytest.mark.parametrize("size", [8, 9, 14, 15, 28, 32, 63, 64])
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("norm", ["pixel", "batch"])
    def test_of_both(self, size, channels, norm):
        generator = DCGANGenerator(size, channels, latent_dim=3, base_channels=2, max_channels=5, norm=norm)
        drawn = generator(noise(2, 3))
        assert drawn.sample.shape == (2, channels, size, size)
        assert drawn.sample.abs().max() <= 1
        assert generator.latent_shape == (3,)
        judged = DCGANDiscriminator(size, channels, base_channels=2, max_channels=5)(drawn.sample)
        assert judged.logits.shape == (2,)
        assert judged.features.shape[0] == 2
        assert judged.features.dim() == 2

    def test_every_size(self):
        for size in range(8, 65):
            widths = resolutions(size)
            assert widths[0] == size
            assert widths[-1] <= 7 < widths[-2]
            assert all(small in (large / 2, (large + 1) / 2) for large, small in zip(widths, widths[1:], strict=False))
            drawn = DCGANGenerator(size, 1, latent_dim=1, base_channels=1)(noise(1, 1)).sample
            assert drawn.shape == (1, 1, size, size)
            assert DCGANDiscriminator(size, 1, base_channels=1)(drawn).logits.shape == (1,)

    def test_channels_double_up_to_the_largest(self):
        generator = DCGANGenerator(64, 1, latent_dim=2, base_channels=2, max_channels=7)
        assert [layer.out_channels for layer, _ in generator.blocks] == [7, 7, 4, 2]
        discriminator = DCGANDiscriminator(64, 1, base_channels=2, max_channels=7)
        assert [layer.out_channels for layer in discriminator.blocks] == [4, 7, 7, 7]

    def test_tuples(self):
        pipe = pipeline()
        z = noise(2, 4)
        x, styles = pipe.generator(z, return_dict=False)
        assert x.equal(pipe.generator(z).sample)
        assert styles.equal(z)
        assert pipe.discriminator(x, return_dict=False)[0].equal(pipe.discriminator(x).logits)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"sample_size": 7}, "sample_size=7: must be from 8 to 64"),
        ({"sample_size": 65}, "sample_size=65: must be from 8 to 64"),
        ({"channels": 2}, "channels=2: must be 1"),
        ({"channels": 0}, "channels=0: must be 1"),
        ({"base_channels": 0}, "base_channels=0: must be from 1"),
        ({"base_channels": 9, "max_channels": 8}, "base_channels=9: must be from 1 to max_channels=8"),
        ({"latent_dim": 0}, "latent_dim=0: must be ≥ 1"),
        ({"norm": "layer"}, "norm='layer': must be one of pixel, batch"),
    ],
)
def test_out_of_range(values, problem):
    for player in (DCGANGenerator, DCGANDiscriminator):
        if values.keys() <= inspect.signature(player).parameters.keys():
            with pytest.raises(ValueError) as error:
                player(**values)
            assert str(error.value).startswith(problem)
            assert "\n" not in str(error.value)


class TestPixelNorm:
    def test_formula(self):
        x = noise(2, 3, 4, 5)
        expected = torch.empty_like(x)
        for n in range(2):
            for i in range(4):
                for j in range(5):
                    vector = x[n, :, i, j]
                    expected[n, :, i, j] = vector / (vector.square().mean() + 1e-8).sqrt()
        torch.testing.assert_close(PixelNorm()(x), expected)
        torch.testing.assert_close(PixelNorm()(1000 * x), expected)  # no scale goes in

    def test_zeros_stay_finite(self):
        x = torch.zeros(1, 3, 2, 2, requires_grad=True)
        PixelNorm()(x).sum().backward()
        assert x.grad.isfinite().all()

    def test_an_image_does_not_depend_on_its_batch(self):
        """In training mode, unlike with BatchNorm."""
        z = noise(6, 4)
        pixel, batch = (pipeline(norm=norm).generator.train() for norm in ("pixel", "batch"))
        torch.testing.assert_close(pixel(z[:1]).sample, pixel(z).sample[:1], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(batch(z[:2]).sample, batch(z).sample[:2], atol=1e-3)


class TestSecondImplementation:
    """Eight pixels: two resolutions, 4 and 8."""

    def test_generator(self):
        generator = pipeline(channels=3).generator
        w, z = generator.state_dict(), noise(2, 4)

        def leaky(x):
            x = x / (x.pow(2).mean(1, keepdim=True) + 1e-8).sqrt()
            return torch.where(x > 0, x, 0.2 * x)

        x = leaky((z @ w["project.weight"].T + w["project.bias"]).reshape(2, 8, 4, 4))
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = leaky(F.conv2d(x, w["blocks.0.0.weight"], w["blocks.0.0.bias"], padding=1))
        x = F.conv2d(x, w["to_image.weight"], w["to_image.bias"], padding=1).tanh()
        torch.testing.assert_close(generator(z).sample, x)

    def test_discriminator(self):
        discriminator = pipeline(channels=3).discriminator
        w, x = discriminator.state_dict(), noise(2, 3, 8, 8)

        def leaky(x):
            return torch.where(x > 0, x, 0.2 * x)

        h = leaky(F.conv2d(x, w["from_image.weight"], w["from_image.bias"], padding=1))
        h = leaky(F.conv2d(h, w["blocks.0.weight"], w["blocks.0.bias"], padding=1)[:, :, ::2, ::2])
        assert h.shape == (2, 8, 4, 4)
        h = leaky(h.reshape(2, -1) @ w["features.weight"].T + w["features.bias"])
        judged = discriminator(x)
        torch.testing.assert_close(judged.features, h)
        torch.testing.assert_close(judged.logits, (h @ w["head.weight"].T + w["head.bias"])[:, 0])


class TestTruncation:
    def test_scales_latents(self):
        generator, z = pipeline().generator, noise(3, 4)
        torch.testing.assert_close(generator(z, truncation=0.3).sample, generator(0.3 * z).sample, rtol=0, atol=0)
        torch.testing.assert_close(generator(z, truncation=0.3).styles, 0.3 * z)
        still = generator(z, truncation=0.0).sample
        assert still.equal(still[:1].expand_as(still))

    def test_styles_make_the_image(self):
        generator, z = pipeline().generator, noise(3, 4)
        drawn = generator(z, truncation=0.7)
        assert generator.synthesize(drawn.styles).equal(drawn.sample)


class TestSaved:
    @pytest.mark.parametrize("norm", ["pixel", "batch"])
    def test_generator(self, tmp_path, norm):
        generator = pipeline(channels=3, norm=norm, size=9).generator
        generator.train()(noise(8, 4))  # BatchNorm has statistics to keep
        generator.save_pretrained(tmp_path)
        loaded = DCGANGenerator.from_pretrained(tmp_path)
        assert same(weights(generator), weights(loaded))
        for name, value in {
            "sample_size": 9,
            "channels": 3,
            "latent_dim": 4,
            "base_channels": 4,
            "norm": norm,
        }.items():
            assert loaded.config[name] == generator.config[name] == value
        assert not loaded.training
        assert loaded(noise(2, 4)).sample.equal(generator.eval()(noise(2, 4)).sample)

    def test_discriminator(self, tmp_path):
        discriminator = DCGANDiscriminator(9, 3, base_channels=3, max_channels=5)
        discriminator.save_pretrained(tmp_path)
        loaded = DCGANDiscriminator.from_pretrained(tmp_path)
        assert same(weights(discriminator), weights(loaded))
        assert {name: loaded.config[name] for name in ("sample_size", "channels", "base_channels", "max_channels")} == {
            "sample_size": 9, "channels": 3, "base_channels": 3, "max_channels": 5,
        }  # fmt: skip
        x = noise(2, 3, 9, 9)
        assert loaded(x).logits.equal(discriminator(x).logits)
