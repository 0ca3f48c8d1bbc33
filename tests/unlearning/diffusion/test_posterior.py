"""Bayes' rule over two banks of images, written out in float64; what must not matter; and improbable images."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from hf_unlearn.training.noise import NoiseSchedule
from hf_unlearn.unlearning.diffusion.posterior import ForgottenPosterior


SHAPE = (1, 3, 4)
TOLERANCE = (
    1e-5  # ten times what fp32 makes of exponents of some tens, 1e-7 each, that are multiplied by shares below 1
)
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


def schedule_of(name):
    return NoiseSchedule.of(DDPMScheduler(**SCHEDULES[name]))


def written_out(noisy, step, schedule, forget, keep, share):
    """Image by image in float64: π, and the guesses of the forget bank, of the bank to keep and of the mixture."""
    cumulative = schedule.alphas_cumprod[step].double().item()
    alpha, variance = math.sqrt(cumulative), 1 - cumulative
    images = torch.cat([forget, keep]).double()
    exponents = [-(noisy.double() - alpha * image).square().sum().item() / (2 * variance) for image in images]
    size, priors = len(forget), [share / len(forget)] * len(forget) + [(1 - share) / len(keep)] * len(keep)

    def guess(of):
        best = max(exponents[i] for i in of)
        masses = {i: priors[i] * math.exp(exponents[i] - best) for i in of}
        return masses, sum(mass * images[i] for i, mass in masses.items()) / sum(masses.values())

    masses, mixture = guess(range(len(images)))
    probability = sum(masses[i] for i in range(size)) / sum(masses.values())
    return probability, guess(range(size))[1], guess(range(size, len(images)))[1], mixture


@pytest.mark.parametrize(("name", "share"), [("linear", 0.02), ("cosine", 0.5), ("zero_snr", 0.9)])
def test_is_bayes_rule_written_out(name, share):
    """And corrects the exact original to the exact model of the kept, the identity of the docstring."""
    (forget, keep), schedule = banks(), schedule_of(name)
    steps = torch.tensor([*range(0, len(schedule), 7), len(schedule) - 1])  # from hardly any noise to nothing else
    noisy = noised(torch.cat([forget, keep]), schedule, steps)
    probability, change = ForgottenPosterior(forget, keep, share)(noisy, steps, schedule)
    assert (probability.shape, change.shape) == ((len(steps),), noisy.shape)
    moved = 0.0
    for row, (image, step) in enumerate(zip(noisy, steps, strict=True)):
        exact, of_forget, of_keep, original = written_out(image, step, schedule, forget, keep, share)
        assert probability[row].item() == pytest.approx(exact, abs=TOLERANCE)
        torch.testing.assert_close(change[row].double(), exact * (of_keep - of_forget), rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(original + change[row].double(), of_keep, rtol=0, atol=TOLERANCE)
        moved = max(moved, (original - of_keep).abs().max().item())
    assert moved > 0.1


def test_finite_however_improbable_the_image():
    (forget, keep), schedule = banks(), NoiseSchedule(torch.tensor([1 - 1e-6, 0.5, 1e-9, 0.0]))
    for share in (1e-6, 0.5, 1 - 1e-6):
        for far in (0.0, 1.0, 1e3):
            noisy = torch.full((4, *SHAPE), far)
            probability, change = ForgottenPosterior(forget, keep, share)(noisy, torch.arange(4), schedule)
            assert ((probability >= 0) & (probability <= 1)).all()
            assert change.isfinite().all()


def test_neither_order_nor_copies_nor_company_matter():
    """And half precision is read in fp32."""
    forget, keep = (bank.bfloat16() for bank in banks())
    schedule = schedule_of("linear")
    steps = torch.arange(0, len(schedule), 50)
    noisy = noised(torch.cat([forget, keep]).float(), schedule, steps).bfloat16()
    expected = ForgottenPosterior(forget, keep, 0.3)(noisy, steps, schedule)
    assert {value.dtype for value in expected} == {torch.float32}
    for other in (
        (forget.float(), keep.float()),
        (forget.flip(0), keep.roll(3, 0)),
        (forget.repeat(2, 1, 1, 1), keep.repeat(2, 1, 1, 1)),
        (forget.repeat(5, 1, 1, 1), keep),
        (forget, keep.repeat(5, 1, 1, 1)),
    ):
        values = ForgottenPosterior(*other, 0.3)(noisy, steps, schedule)
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    for row in (0, 7, 19):
        alone = ForgottenPosterior(forget, keep, 0.3)(noisy[row : row + 1], steps[row : row + 1], schedule)
        together = tuple(value[row : row + 1] for value in expected)
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
