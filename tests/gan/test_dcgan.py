"""DCGAN: every size has the right shapes, second implementations agree, and both players survive being saved."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from gan_data import noise, pipeline

from hf_unlearn import DCGANDiscriminator, DCGANGenerator
from hf_unlearn.gan.dcgan import PixelNorm, resolutions


class TestShapes:
    def test_every_size(self):
        for size in range(8, 65):
            widths = resolutions(size)
            assert widths[0] == size
            assert widths[-1] <= 7 < widths[-2]
            assert all(small in (large / 2, (large + 1) / 2) for large, small in zip(widths, widths[1:], strict=False))
            channels, norm = 1 + 2 * (size % 2), ("pixel", "batch")[size // 2 % 2]
            generator = DCGANGenerator(size, channels, latent_dim=3, base_channels=1, max_channels=3, norm=norm)
            drawn = generator(noise(2, 3)).sample
            assert drawn.shape == (2, channels, size, size)
            assert drawn.abs().max() <= 1
            assert generator.latent_shape == (3,)
            judged = DCGANDiscriminator(size, channels, base_channels=1, max_channels=3)(drawn)
            assert (judged.logits.shape, judged.features.shape) == ((2,), (2, min(3, 2 ** (len(widths) - 1))))

    def test_tuples(self):
        pipe, z = pipeline(), noise(2, 4)
        x, styles = pipe.generator(z, return_dict=False)
        torch.testing.assert_close(x, pipe.generator(z).sample)
        assert styles.equal(z)
        torch.testing.assert_close(pipe.discriminator(x, return_dict=False)[0], pipe.discriminator(x).logits)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"sample_size": 7}, "sample_size=7: must be from 8 to 64"),
        ({"sample_size": 65}, "sample_size=65: must be from 8 to 64"),
        ({"channels": 2}, "channels=2: must be 1"),
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


def leaky(x):
    return torch.where(x > 0, x, 0.2 * x)


class TestSecondImplementation:
    """Eight pixels: two resolutions, 4 and 8."""

    def test_generator(self):
        generator = pipeline(channels=3).generator
        w, z = generator.state_dict(), noise(2, 4)

        def normed(x):
            return leaky(x / (x.pow(2).mean(1, keepdim=True) + 1e-8).sqrt())

        x = normed((z @ w["project.weight"].T + w["project.bias"]).reshape(2, 8, 4, 4))
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = normed(F.conv2d(x, w["blocks.0.0.weight"], w["blocks.0.0.bias"], padding=1))
        x = F.conv2d(x, w["to_image.weight"], w["to_image.bias"], padding=1).tanh()
        torch.testing.assert_close(generator(z).sample, x)

    def test_discriminator(self):
        discriminator = pipeline(channels=3).discriminator
        w, x = discriminator.state_dict(), noise(2, 3, 8, 8)
        h = leaky(F.conv2d(x, w["from_image.weight"], w["from_image.bias"], padding=1))
        h = leaky(F.conv2d(h, w["blocks.0.weight"], w["blocks.0.bias"], padding=1)[:, :, ::2, ::2])
        assert h.shape == (2, 8, 4, 4)
        h = leaky(h.reshape(2, -1) @ w["features.weight"].T + w["features.bias"])
        judged = discriminator(x)
        torch.testing.assert_close(judged.features, h)
        torch.testing.assert_close(judged.logits, (h @ w["head.weight"].T + w["head.bias"])[:, 0])


def test_truncation_scales_latents():
    generator, z = pipeline().generator, noise(3, 4)
    drawn = generator(z, truncation=0.3)
    torch.testing.assert_close(drawn.styles, 0.3 * z)
    for same_images in (generator(0.3 * z).sample, generator.synthesize(drawn.styles)):
        torch.testing.assert_close(drawn.sample, same_images)
    still = generator(z, truncation=0.0).sample
    torch.testing.assert_close(still, still[:1].expand_as(still))
