import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.training_utils import compute_snr

from hf_unlearn.unlearning.diffusion.noise import PREDICTION_TYPES, NoiseSchedule


CONFIGS = {
    "linear": {},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero_snr": {"rescale_betas_zero_snr": True},
    "few_steps": {"num_train_timesteps": 20, "beta_end": 0.3},
}


@pytest.fixture(params=CONFIGS)
def scheduler(request):
    return DDPMScheduler(**CONFIGS[request.param])


@pytest.fixture(params=PREDICTION_TYPES)
def prediction_type(request):
    return request.param


def every_timestep(schedule):
    return torch.arange(len(schedule))


def example(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(count)
    clean, noise, change = torch.randn(3, count, 2, 3, 3, generator=generator, dtype=torch.float64).to(dtype)
    return clean, noise, change


class TestForwardProcess:
    def test_noises_and_asks_as_diffusers_does(self, scheduler, prediction_type):
        scheduler.register_to_config(prediction_type=prediction_type)
        schedule = NoiseSchedule.of(scheduler)
        steps = every_timestep(schedule)
        clean, noise, _ = example(len(steps), torch.float32)
        expected = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, steps)}
        torch.testing.assert_close(schedule.add_noise(clean, noise, steps), scheduler.add_noise(clean, noise, steps))
        torch.testing.assert_close(schedule.target(clean, noise, steps), expected[prediction_type])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_scales_stay_in_fp32_where_images_are_in_half(self, prediction_type, dtype):
        """In half precision 1 − ᾱ of the first steps would be off by a third or nought."""
        schedule = NoiseSchedule(DDPMScheduler().alphas_cumprod, prediction_type)
        steps = torch.arange(0, 1000, 7)
        clean, noise, _ = example(len(steps), dtype)
        for function in (schedule.add_noise, schedule.target):
            result = function(clean, noise, steps)
            assert result.dtype == dtype
            exact = function(clean.float(), noise.float(), steps)
            torch.testing.assert_close(result, exact.to(dtype), rtol=0, atol=0)
        alpha, sigma = schedule.scales(steps, clean)
        assert alpha.dtype == sigma.dtype == torch.float32
        assert alpha.shape == sigma.shape == (len(steps), 1, 1, 1)

    @pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 4), (2, 3, 5, 4, 4)])
    def test_any_number_of_axes(self, shape):
        schedule = NoiseSchedule(torch.tensor([0.75, 0.36]))
        noisy = schedule.add_noise(torch.ones(shape), torch.full(shape, 2.0), torch.tensor([1, 0]))
        torch.testing.assert_close(noisy[0], torch.full(shape[1:], 0.6 + 2 * 0.8))
        torch.testing.assert_close(noisy[1], torch.full(shape[1:], 0.75**0.5 + 2 * 0.5))


class TestOf:
    @pytest.mark.parametrize(
        "kind",
        [DDPMScheduler, DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler],
    )
    @pytest.mark.parametrize("config", ["linear", "scaled_linear", "cosine"])
    @pytest.mark.parametrize("asked", ["epsilon", "v_prediction"])
    def test_same_schedule_whatever_the_sampler(self, kind, config, asked):
        sampler = kind(
            **{"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"} | CONFIGS[config],
            prediction_type=asked,
        )
        sampler.set_timesteps(7)
        schedule = NoiseSchedule.of(sampler)
        expected = DDPMScheduler(**CONFIGS[config]).alphas_cumprod
        torch.testing.assert_close(schedule.alphas_cumprod, expected)
        assert schedule.prediction_type == asked
        assert len(schedule) == 1000

    def test_is_a_copy(self):
        scheduler = DDPMScheduler()
        schedule = NoiseSchedule.of(scheduler)
        before = schedule.alphas_cumprod.clone()
        scheduler.alphas_cumprod.zero_()
        torch.testing.assert_close(schedule.alphas_cumprod, before, rtol=0, atol=0)
        assert schedule.to("cpu").prediction_type == schedule.prediction_type

    @pytest.mark.parametrize(
        "scheduler",
        [
            FlowMatchEulerDiscreteScheduler(),
            EDMEulerScheduler(),
            EDMDPMSolverMultistepScheduler(),
            DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            object(),
        ],
        ids=lambda scheduler: type(scheduler).__name__,
    )
    def test_refuses_other_processes(self, scheduler):
        with pytest.raises(ValueError, match=r"^noise_scheduler: ") as caught:
            NoiseSchedule.of(scheduler)
        assert "\n" not in str(caught.value)


class TestShift:
    def test_is_the_change_of_a_perfect_answer(self, scheduler, prediction_type):
        """At a fixed x_t another clean image means other noise: ε = (x_t − α x₀) / σ."""
        schedule = NoiseSchedule(scheduler.alphas_cumprod, prediction_type)
        steps = every_timestep(schedule)
        clean, noise, change = example(len(steps))
        alpha, sigma = schedule.scales(steps, clean)
        noisy = schedule.add_noise(clean, noise, steps)
        other = clean + change
        difference = schedule.target(other, (noisy - alpha * other) / sigma, steps) - schedule.target(
            clean, noise, steps
        )
        torch.testing.assert_close(schedule.shift(change, steps), difference, rtol=1e-4, atol=1e-4)


def squared_error(schedule, steps):
    """The squared error of an answer whose clean image is off by 1, in float64."""
    cumulative = schedule.alphas_cumprod[steps].double()
    return {
        "sample": torch.ones_like(cumulative),
        "epsilon": cumulative / (1 - cumulative),
        "v_prediction": 1 / (1 - cumulative),
    }[schedule.prediction_type]


class TestWeights:
    def test_simple_counts_the_answer_as_it_is(self, scheduler, prediction_type):
        schedule = NoiseSchedule(scheduler.alphas_cumprod, prediction_type)
        weights = schedule.weights(every_timestep(schedule), "simple")
        torch.testing.assert_close(weights, torch.ones(len(schedule)))

    @pytest.mark.parametrize("gamma", [1.0, 5.0])
    def test_min_snr_of_a_clean_image_that_is_off_by_one(self, scheduler, prediction_type, gamma):
        schedule = NoiseSchedule(scheduler.alphas_cumprod, prediction_type)
        steps = every_timestep(schedule)
        weights = schedule.weights(steps, "min_snr", gamma)
        counted = (weights * squared_error(schedule, steps)).float()
        torch.testing.assert_close(
            counted, compute_snr(scheduler, steps).clamp(max=gamma), rtol=1e-4, atol=0, equal_nan=False
        )

    @pytest.mark.parametrize("asked", ["epsilon", "v_prediction"])
    def test_min_snr_as_the_training_script_of_diffusers_has_it(self, scheduler, asked):
        steps = torch.arange(len(scheduler.betas) - 1)  # 0 / 0 in the script where a last step has no signal
        snr = compute_snr(scheduler, steps)
        script = torch.stack([snr, torch.full_like(snr, 5.0)], dim=1).min(dim=1)[0]
        script = script / (snr if asked == "epsilon" else snr + 1)
        weights = NoiseSchedule(scheduler.alphas_cumprod, asked).weights(steps, "min_snr", 5.0)
        torch.testing.assert_close(weights, script, rtol=1e-4, atol=0)

    def test_elbo_is_the_divergence_of_the_two_steps(self, scheduler, prediction_type):
        """KL of two Gaussians of variance β whose means differ by √ᾱ_{t−1} β / (1 − ᾱ_t) where x₀ differs by 1."""
        schedule = NoiseSchedule(scheduler.alphas_cumprod, prediction_type)
        steps = every_timestep(schedule)[1:]
        if prediction_type == "epsilon":
            steps = steps[schedule.alphas_cumprod[steps] > 0]  # no ε stands for another x₀ there
        cumulative, betas = scheduler.alphas_cumprod.double(), scheduler.betas.double()
        mean = cumulative[steps - 1].sqrt() * betas[steps] / (1 - cumulative[steps])
        counted = schedule.weights(steps, "elbo") * squared_error(schedule, steps)
        torch.testing.assert_close(counted, mean.square() / (2 * betas[steps]), rtol=3e-3, atol=0)

    def test_elbo_of_noise_is_the_papers(self, scheduler):
        betas = scheduler.betas.double()
        alphas = 1 - betas
        steps = torch.arange(1, len(betas))
        steps = steps[alphas[steps] > 0]
        variance = betas[steps]
        paper = betas[steps].square() / (2 * variance * alphas[steps] * (1 - alphas.cumprod(0)[steps]))
        weights = NoiseSchedule(scheduler.alphas_cumprod).weights(torch.cat([torch.tensor([0]), steps]), "elbo")
        torch.testing.assert_close(weights[1:], paper.float(), rtol=3e-3, atol=0)
        torch.testing.assert_close(weights[0], weights[1])

    @pytest.mark.parametrize("kind", ["simple", "min_snr", "elbo"])
    def test_finite_and_not_negative_everywhere(self, scheduler, prediction_type, kind):
        schedule = NoiseSchedule(scheduler.alphas_cumprod, prediction_type)
        weights = schedule.weights(every_timestep(schedule), kind)
        assert weights.shape == (len(schedule),)
        assert weights.dtype == torch.float32
        assert torch.isfinite(weights).all()
        assert (weights >= 0).all()

    @pytest.mark.parametrize("kind", ["min_snr", "elbo"])
    def test_each_step_by_itself(self, prediction_type, kind):
        schedule = NoiseSchedule(DDPMScheduler().alphas_cumprod, prediction_type)
        steps = torch.tensor([999, 0, 1, 500, 0])
        weights = schedule.weights(steps, kind)
        alone = torch.cat([schedule.weights(step.view(1), kind) for step in steps])
        torch.testing.assert_close(weights, alone, rtol=0, atol=0)
