"""Losses of both players against closed forms, finite differences and whole Jacobians."""

import pytest
import torch
import torch.nn.functional as F
from gan_data import noise as noise_of
from gan_data import pipeline, style_pipeline

from hf_unlearn.gan.losses import discriminator_loss, generator_loss, path_lengths, r1_penalty


def noise(*shape, seed=0):
    return noise_of(*shape, seed=seed, dtype=torch.float64)


class TestLogistic:
    def test_cross_entropy(self):
        real, drawn = 3 * noise(5), 3 * noise(7, seed=1)
        expected = F.binary_cross_entropy_with_logits(real, torch.ones(5, dtype=torch.float64))
        expected += F.binary_cross_entropy_with_logits(drawn, torch.zeros(7, dtype=torch.float64))
        torch.testing.assert_close(discriminator_loss(real, drawn), expected)
        expected = F.binary_cross_entropy_with_logits(drawn, torch.ones(7, dtype=torch.float64))
        torch.testing.assert_close(generator_loss(drawn), expected)

    def test_a_certain_discriminator_still_pushes(self):
        """The saturating loss log(1 − σ) would give the generator nothing here."""
        scores = torch.full((3,), -200.0, requires_grad=True)
        loss = generator_loss(scores)
        (slope,) = torch.autograd.grad(loss, scores)
        assert loss.item() == pytest.approx(200)
        torch.testing.assert_close(slope, torch.full((3,), -1 / 3))
        assert discriminator_loss(torch.full((2,), 300.0), torch.full((2,), -300.0)).item() == pytest.approx(0)


class TestR1:
    def test_quadratic(self):
        """D(x) = a/2 ‖x‖² has the slope a·x; the penalty is a²/2 E‖x‖², and its own slope a E‖x‖²."""
        a = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
        x = noise(4, 3, 2, 2).requires_grad_(True)
        penalty = r1_penalty(a / 2 * x.square().flatten(1).sum(1), x)
        mean = x.detach().square().flatten(1).sum(1).mean()
        torch.testing.assert_close(penalty, a.detach() ** 2 / 2 * mean)
        torch.testing.assert_close(torch.autograd.grad(penalty, a)[0], a.detach() * mean)

    def test_finite_differences(self):
        discriminator = pipeline(dtype=torch.float64).discriminator
        x = noise(3, 1, 8, 8).clamp(-1, 1)
        leaf = x.clone().requires_grad_(True)
        penalty = r1_penalty(discriminator(leaf).logits, leaf)
        h, squares = 1e-6, torch.zeros(3, dtype=torch.float64)
        with torch.no_grad():
            for pixel in torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8):
                up, down = discriminator(x + h * pixel).logits, discriminator(x - h * pixel).logits
                squares += ((up - down) / (2 * h)).square()
        torch.testing.assert_close(penalty.detach(), squares.mean() / 2, rtol=1e-5, atol=1e-12)


class TestPathLengths:
    @pytest.mark.parametrize("make", [pipeline, style_pipeline])
    def test_whole_jacobian(self, make):
        generator = make(dtype=torch.float64).generator
        styles = generator.map_latents(noise(2, *generator.latent_shape)).detach().requires_grad_(True)
        images = generator.synthesize(styles)
        lengths = path_lengths(images, styles, torch.Generator().manual_seed(8))
        y = torch.randn(images.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64) / 8
        for one in range(2):
            jacobian = torch.autograd.functional.jacobian(generator.synthesize, styles[one : one + 1].detach())
            expected = torch.tensordot(y[one : one + 1], jacobian, dims=4).norm()
            torch.testing.assert_close(lengths[one].detach(), expected)

    def test_has_a_graph_of_its_own(self):
        """G(w) = a w with one pixel: ‖Jᵀy‖ = |a y|, with the slope |y| sign(a)."""
        a = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
        w = noise(1, 1).requires_grad_(True)
        lengths = path_lengths((a * w).reshape(1, 1, 1, 1), w, torch.Generator().manual_seed(8))
        (slope,) = torch.autograd.grad(lengths.sum(), a)
        torch.testing.assert_close(slope, -lengths.detach()[0] / 2)

    def test_an_image_that_does_not_move(self):
        """A saturated generator has no slope; a square root there must not make NaN of every weight."""
        a = torch.zeros((), dtype=torch.float64, requires_grad=True)
        w = noise(3, 1).requires_grad_(True)
        lengths = path_lengths((a * w).reshape(3, 1, 1, 1), w, torch.Generator().manual_seed(8))
        (slope,) = torch.autograd.grad((lengths - 1).square().mean(), a)
        assert lengths.equal(torch.zeros(3, dtype=torch.float64))
        assert slope.isfinite()
