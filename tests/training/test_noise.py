"""The forward process as diffusers and the papers have it, and what a perfect denoiser would answer."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.training_utils import compute_snr

from hf_unlearn.training.noise import FlowSchedule, NoiseSchedule


CONFIGS = {
    "linear": {},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero_snr": {"rescale_betas_zero_snr": True},
    "few_steps": {"num_train_timesteps": 20, "beta_end": 0.3},
}
# Each schedule and each form of answer; every form where the last step has no signal to divide by.
CASES = [
    ("linear", "epsilon"), ("scaled_linear", "v_prediction"), ("cosine", "epsilon"), ("few_steps", "sample"),
    ("zero_snr", "epsilon"), ("zero_snr", "v_prediction"), ("zero_snr", "sample"),
]  # fmt: skip


@pytest.fixture(params=CASES, ids=" ".join)
def scheduler(request):
    config, prediction = request.param
    return DDPMScheduler(**CONFIGS[config], prediction_type=prediction)


@pytest.fixture
def schedule(scheduler):
    return NoiseSchedule.of(scheduler)


def every(schedule):
    return torch.arange(len(schedule))


def example(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(count)
    clean, noise, change = torch.randn(3, count, 2, 3, 3, generator=generator, dtype=torch.float64).to(dtype)
    return clean, noise, change


class TestForwardProcess:
    def test_an_answer_parts_a_noisy_image(self, schedule):
        flow = FlowSchedule.of(FlowMatchEulerDiscreteScheduler(shift=3.0))
        for kind in (schedule, flow):
            steps = torch.arange(9 * len(kind) // 10)  # where there is signal to divide by
            clean, noise, _ = example(len(steps))
            answer, noisy = kind.target(clean, noise, steps), kind.add_noise(clean, noise, steps)
            torch.testing.assert_close(kind.parts(answer, noisy, steps), (clean, noise), rtol=1e-4, atol=1e-4)

    def test_noises_and_asks_as_diffusers_does(self, scheduler, schedule):
        steps = every(schedule)
        clean, noise, _ = example(len(steps), torch.float32)
        expected = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, steps)}
        torch.testing.assert_close(schedule.add_noise(clean, noise, steps), scheduler.add_noise(clean, noise, steps))
        asked = expected[scheduler.config.prediction_type]
        torch.testing.assert_close(schedule.target(clean, noise, steps), asked)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_scales_stay_in_fp32_where_images_are_in_half(self, schedule, dtype):
        """In half precision 1 − ᾱ of the first steps would be off by a third or nought."""
        steps = every(schedule)[::7]
        clean, noise, _ = example(len(steps), dtype)
        for function in (schedule.add_noise, schedule.target):
            result = function(clean, noise, steps)
            assert result.dtype == dtype
            exact = function(clean.float(), noise.float(), steps).to(dtype)
            assert torch.equal(result, exact)  # element by element, each operation rounded once in fp32
        alpha, sigma = schedule.scales(steps, clean)
        assert alpha.dtype == sigma.dtype == torch.float32
        assert alpha.shape == sigma.shape == (len(steps), 1, 1, 1)

    @pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5, 4, 4)])
    def test_any_number_of_axes(self, shape):
        schedule = NoiseSchedule(torch.tensor([0.75, 0.36]))
        noisy = schedule.add_noise(torch.ones(shape), torch.full(shape, 2.0), torch.tensor([1, 0]))
        torch.testing.assert_close(noisy[0], torch.full(shape[1:], 0.6 + 2 * 0.8))
        torch.testing.assert_close(noisy[1], torch.full(shape[1:], 0.75**0.5 + 2 * 0.5))

    def test_shift_is_the_change_of_a_perfect_answer(self, schedule):
        """At a fixed x_t another clean image means other noise: ε = (x_t − α x₀) / σ."""
        steps = every(schedule)
        clean, noise, change = example(len(steps))
        alpha, sigma = schedule.scales(steps, clean)
        noisy, other = schedule.add_noise(clean, noise, steps), clean + change
        after = schedule.target(other, (noisy - alpha * other) / sigma, steps)
        difference = after - schedule.target(clean, noise, steps)
        torch.testing.assert_close(schedule.shift(change, steps), difference, rtol=1e-4, atol=1e-4)


class TestOf:
    @pytest.mark.parametrize(
        ("kind", "config", "asked"),
        [
            (DDPMScheduler, "cosine", "sample"),
            (DDIMScheduler, "linear", "v_prediction"),
            (PNDMScheduler, "scaled_linear", "epsilon"),
            (EulerDiscreteScheduler, "linear", "epsilon"),
            (EulerDiscreteScheduler, "scaled_linear", "v_prediction"),
            (DPMSolverMultistepScheduler, "cosine", "v_prediction"),
        ],
    )
    def test_same_schedule_whatever_the_sampler(self, kind, config, asked):
        linear = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
        sampler = kind(**linear | CONFIGS[config], prediction_type=asked)
        sampler.set_timesteps(7)
        schedule = NoiseSchedule.of(sampler)
        torch.testing.assert_close(schedule.alphas_cumprod, DDPMScheduler(**CONFIGS[config]).alphas_cumprod)
        assert (schedule.prediction_type, len(schedule)) == (asked, 1000)
        assert schedule.to("cpu").prediction_type == asked
        before = schedule.alphas_cumprod.clone()
        sampler.alphas_cumprod.zero_()
        assert torch.equal(schedule.alphas_cumprod, before)  # a copy

    @pytest.mark.parametrize(
        ("scheduler", "words"),
        [
            (FlowMatchEulerDiscreteScheduler(), "has no add_noise|has no alphas_cumprod"),
            (EDMEulerScheduler(), "has no alphas_cumprod"),
            (
                DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
                "prediction_type='flow_prediction'",
            ),
            (object(), "object has no add_noise"),
        ],
        ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
    )
    def test_refuses_other_processes(self, scheduler, words):
        with pytest.raises(ValueError, match=f"^noise_scheduler: .*({words})") as caught:
            NoiseSchedule.of(scheduler)
        assert "\n" not in str(caught.value)


def squared_error(schedule, steps):
    """The squared error of an answer whose clean image is off by 1, in float64."""
    cumulative = schedule.alphas_cumprod[steps].double()
    return {
        "sample": torch.ones_like(cumulative),
        "epsilon": cumulative / (1 - cumulative),
        "v_prediction": 1 / (1 - cumulative),
    }[schedule.prediction_type]


class TestWeights:
    @pytest.mark.parametrize("gamma", [1.0, 5.0])
    def test_min_snr_of_a_clean_image_that_is_off_by_one(self, scheduler, schedule, gamma):
        steps = every(schedule)
        counted = (schedule.weights(steps, "min_snr", gamma) * squared_error(schedule, steps)).float()
        expected = compute_snr(scheduler, steps).clamp(max=gamma)
        torch.testing.assert_close(counted, expected, rtol=1e-4, atol=0)

    def test_elbo_is_the_divergence_of_the_two_steps(self, scheduler, schedule):
        """KL of two Gaussians of variance β whose means differ by √ᾱ_{t−1} β / (1 − ᾱ_t) where x₀ differs by 1."""
        steps = every(schedule)[1:]
        if schedule.prediction_type == "epsilon":
            steps = steps[schedule.alphas_cumprod[steps] > 0]  # no ε stands for another x₀ there
        cumulative, betas = scheduler.alphas_cumprod.double(), scheduler.betas.double()
        mean = cumulative[steps - 1].sqrt() * betas[steps] / (1 - cumulative[steps])
        counted = schedule.weights(steps, "elbo") * squared_error(schedule, steps)
        # 1 − ᾱ of the second step is a difference that fp32 has to three digits.
        torch.testing.assert_close(counted, mean.square() / (2 * betas[steps]), rtol=3e-3, atol=0)

    def test_finite_not_negative_and_each_step_by_itself(self, schedule):
        steps = every(schedule)
        picked = torch.tensor([len(schedule) - 1, 0, 1, len(schedule) // 2, 0])
        assert torch.equal(schedule.weights(steps, "simple"), torch.ones(len(schedule)))
        for kind in ("min_snr", "elbo"):
            weights = schedule.weights(steps, kind)
            assert (weights.shape, weights.dtype) == ((len(schedule),), torch.float32)
            assert weights.isfinite().all()
            assert (weights >= 0).all()
            if (
                kind == "elbo" and schedule.prediction_type == "epsilon"
            ):  # the step that ends at x₀ counts as its neighbour
                torch.testing.assert_close(weights[0], weights[1])
            alone = torch.cat([schedule.weights(step.view(1), kind) for step in picked])
            torch.testing.assert_close(weights[picked], alone)
