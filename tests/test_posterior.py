import math

import pytest
import torch
from diffusers import DDPMScheduler

from hf_unlearn.unlearning.diffusion.noise import NoiseSchedule
from hf_unlearn.unlearning.diffusion.posterior import ForgottenPosterior, log_likelihoods


SHAPE = (1, 3, 4)
SCHEDULES = {
    "linear": {},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero_snr": {"rescale_betas_zero_snr": True},
}


def banks(forget=4, keep=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(forget + keep, *SHAPE, generator=generator).mul(0.5).tanh()
    return images[:forget], images[forget:]


def noised(images, schedule, steps, seed=1):
    """One of the images at each step."""
    generator = torch.Generator().manual_seed(seed)
    picked = images[torch.randint(len(images), (len(steps),), generator=generator)]
    return schedule.add_noise(picked, torch.randn(picked.shape, generator=generator), steps)


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return NoiseSchedule.of(DDPMScheduler(**SCHEDULES[request.param]))


def written_out(noisy, step, schedule, forget, keep, share):
    """Bayes' rule image by image in float64: π, the guess of either bank and that of the mixture."""
    cumulative = schedule.alphas_cumprod[step].double().item()
    alpha, variance = math.sqrt(cumulative), 1 - cumulative
    candidates = [(share / len(forget), image.double(), True) for image in forget]
    candidates += [((1 - share) / len(keep), image.double(), False) for image in keep]
    exponents = [
        -(noisy.double() - alpha * image).square().sum().item() / (2 * variance) for _, image, _ in candidates
    ]

    def guess(wanted):
        best = max(e for e, (_, _, kind) in zip(exponents, candidates, strict=True) if kind in wanted)
        masses = [
            prior * math.exp(e - best) if kind in wanted else 0.0
            for e, (prior, _, kind) in zip(exponents, candidates, strict=True)
        ]
        mean = sum(mass * image for mass, (_, image, _) in zip(masses, candidates, strict=True)) / sum(masses)
        return masses, sum(masses), mean

    masses, total, mixture = guess((True, False))
    probability = sum(mass for mass, (_, _, kind) in zip(masses, candidates, strict=True) if kind) / total
    return probability, guess((True,))[2], guess((False,))[2], mixture


class TestLogLikelihoods:
    def test_differences_within_a_row_are_those_of_the_densities(self):
        forget, keep = banks()
        bank, noisy = torch.cat([forget, keep]), banks(seed=3)[0]
        alpha, sigma = torch.rand(2, len(noisy), 1, 1, 1, generator=torch.Generator().manual_seed(0)) + 0.2
        values = log_likelihoods(noisy, bank, alpha, sigma)
        assert values.shape == (len(noisy), len(bank))
        for row, (x, a, s) in enumerate(zip(noisy, alpha, sigma, strict=True)):
            density = torch.distributions.Normal(a * bank, s).log_prob(x).flatten(1).sum(1)
            torch.testing.assert_close(values[row] - values[row, 0], density - density[0], rtol=1e-4, atol=1e-4)


class TestForgottenPosterior:
    @pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
    def test_is_bayes_rule_written_out(self, schedule, share):
        forget, keep = banks()
        steps = torch.arange(0, len(schedule), 37)
        noisy = noised(torch.cat([forget, keep]), schedule, steps)
        probability, change = ForgottenPosterior(forget, keep, share)(noisy, steps, schedule)
        assert probability.shape == (len(steps),)
        assert change.shape == noisy.shape
        for row, (image, step) in enumerate(zip(noisy, steps, strict=True)):
            exact, of_forget, of_keep, _ = written_out(image, step, schedule, forget, keep, share)
            assert probability[row].item() == pytest.approx(exact, abs=1e-5)
            torch.testing.assert_close(change[row].double(), exact * (of_keep - of_forget), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("share", [0.1, 0.7])
    def test_corrects_the_exact_original_to_the_exact_model_of_the_kept(self, schedule, share):
        """The identity of the docstring, at every timestep and for images of both kinds."""
        forget, keep = banks()
        steps = torch.arange(len(schedule))
        noisy = noised(torch.cat([forget, keep]), schedule, steps)
        _, change = ForgottenPosterior(forget, keep, share)(noisy, steps, schedule)
        exact = [
            written_out(image, step, schedule, forget, keep, share) for image, step in zip(noisy, steps, strict=True)
        ]
        of_keep, original = torch.stack([e[2] for e in exact]), torch.stack([e[3] for e in exact])
        assert (original - of_keep).abs().max() > 0.1
        torch.testing.assert_close(original + change.double(), of_keep, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
    def test_pure_noise_says_nothing(self, share):
        schedule = NoiseSchedule.of(DDPMScheduler(rescale_betas_zero_snr=True))
        forget, keep = banks()
        noise = torch.randn(50, *SHAPE, generator=torch.Generator().manual_seed(0))
        last = torch.full((50,), len(schedule) - 1)
        probability, change = ForgottenPosterior(forget, keep, share)(noise, last, schedule)
        torch.testing.assert_close(probability, torch.full((50,), share), rtol=1e-5, atol=0)
        shift = share * (keep.mean(0) - forget.mean(0))
        torch.testing.assert_close(change, shift.expand_as(change), rtol=1e-4, atol=1e-5)

    def test_is_sure_of_a_barely_noised_image(self, schedule):
        forget, keep = banks()
        posterior = ForgottenPosterior(forget, keep, 0.3)
        for bank, expected in ((forget, 1.0), (keep, 0.0)):
            first = torch.zeros(len(bank), dtype=torch.long)
            noise = torch.randn(bank.shape, generator=torch.Generator().manual_seed(0))
            noisy = schedule.add_noise(bank, noise, first)
            probability, change = posterior(noisy, first, schedule)
            torch.testing.assert_close(probability, torch.full((len(bank),), expected))
            if expected:
                nearest = torch.cdist(noisy.flatten(1), keep.flatten(1)).argmin(1)
                torch.testing.assert_close(change, keep[nearest] - bank)
            else:
                torch.testing.assert_close(change, torch.zeros_like(change))

    def test_finite_however_improbable_the_image(self):
        schedule = NoiseSchedule(torch.tensor([1 - 1e-6, 0.5, 1e-9, 0.0]))
        forget, keep = banks()
        for share in (1e-6, 0.5, 1 - 1e-6):
            for far in (0.0, 1.0, 1e3):
                probability, change = ForgottenPosterior(forget, keep, share)(
                    torch.full((4, *SHAPE), far), torch.arange(4), schedule
                )
                assert torch.isfinite(probability).all()
                assert torch.isfinite(change).all()
                assert probability.min() >= 0
                assert probability.max() <= 1

    def test_neither_order_nor_copies_matter(self, schedule):
        forget, keep = banks()
        steps = torch.arange(0, len(schedule), 50)
        noisy = noised(torch.cat([forget, keep]), schedule, steps)
        expected = ForgottenPosterior(forget, keep, 0.3)(noisy, steps, schedule)
        for other in (
            (forget.flip(0), keep.roll(3, 0)),
            (forget.repeat(2, 1, 1, 1), keep.repeat(2, 1, 1, 1)),
            (forget.repeat(5, 1, 1, 1), keep),
            (forget, keep.repeat(5, 1, 1, 1)),
        ):
            for value, reference in zip(
                ForgottenPosterior(*other, 0.3)(noisy, steps, schedule), expected, strict=True
            ):
                torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5)

    def test_each_image_by_itself_and_in_fp32(self, schedule):
        forget, keep = banks()
        steps = torch.tensor([900, 10, 400])
        noisy = noised(torch.cat([forget, keep]), schedule, steps).bfloat16()
        posterior = ForgottenPosterior(forget.bfloat16(), keep.bfloat16(), 0.3)
        together = posterior(noisy, steps, schedule)
        assert {value.dtype for value in together} == {torch.float32}
        for row in range(3):
            alone = posterior(noisy[row : row + 1], steps[row : row + 1], schedule)
            for value, whole in zip(alone, together, strict=True):
                torch.testing.assert_close(value[0], whole[row], rtol=1e-5, atol=1e-6)

    def test_banks_of_two_gaussians_approach_their_closed_form(self):
        """x₀ ~ 0.3 N(−1, 0.2²) + 0.7 N(1, 0.4²): every posterior is Gaussian."""
        generator = torch.Generator().manual_seed(0)
        forget = -1 + 0.2 * torch.randn(20_000, 1, generator=generator)
        keep = 1 + 0.4 * torch.randn(20_000, 1, generator=generator)
        schedule = NoiseSchedule(torch.tensor([0.5, 0.3, 0.05]))
        x = torch.linspace(-1.5, 1.5, 9).repeat(3).unsqueeze(1)
        steps = torch.arange(3).repeat_interleave(9)
        probability, change = ForgottenPosterior(forget, keep, 0.3)(x, steps, schedule)

        alpha, sigma = schedule.scales(steps, x)
        densities, guesses = [], []
        for prior, mean, std in ((0.3, -1.0, 0.2), (0.7, 1.0, 0.4)):
            total = (alpha * std).square() + sigma.square()
            densities.append(prior * torch.distributions.Normal(alpha * mean, total.sqrt()).log_prob(x).exp())
            guesses.append(mean + alpha * std**2 / total * (x - alpha * mean))
        expected = densities[0] / (densities[0] + densities[1])
        torch.testing.assert_close(probability, expected.squeeze(1), rtol=0, atol=0.01)
        torch.testing.assert_close(change, expected * (guesses[1] - guesses[0]), rtol=0, atol=0.02)
