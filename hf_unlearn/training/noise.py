"""The forward process of a diffusion model: what a denoiser is shown, and what it should answer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class NoiseSchedule:
    r"""The variance-preserving forward process $x_t = \alpha_t x_0 + \sigma_t \epsilon$ with $\alpha_t^2 = \bar\alpha_t$,
    $\sigma_t^2 = 1 - \bar\alpha_t$ (DDPM, arXiv 2006.11239, eq. 4), and a denoiser's answer in one of three forms:
    `"epsilon"` ε, `"sample"` x₀, `"v_prediction"` α ε − σ x₀ (arXiv 2202.00512).

    Attributes:
        alphas_cumprod (`Tensor`): ᾱ, `[timesteps]`, fp32.
        prediction_type (`str`): what the denoiser predicts.
    """

    alphas_cumprod: Tensor
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow"] = "epsilon"

    @classmethod
    def of(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule that a diffusers scheduler samples from, whichever its sampler.

        Raises:
            ValueError: the scheduler adds no noise in this way (flow matching, EDM), or predicts something else.
        """
        name = type(scheduler).__name__
        if not hasattr(scheduler, "add_noise"):
            raise ValueError(
                f"noise_scheduler: {name} has no add_noise, so nothing can be noised with it; use DDPMScheduler"
            )
        if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
            raise ValueError(
                f"noise_scheduler: {name} has no alphas_cumprod; variance-preserving schedulers are supported"
            )
        prediction = scheduler.config.get("prediction_type", "epsilon")
        if prediction not in PREDICTION_TYPES:
            raise ValueError(
                f"noise_scheduler: prediction_type={prediction!r} is not one of {', '.join(PREDICTION_TYPES)}"
            )
        return cls(scheduler.alphas_cumprod.detach().float().clone(), prediction)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        return NoiseSchedule(self.alphas_cumprod.to(device), self.prediction_type)

    def times(self, timesteps: Tensor) -> Tensor:
        """What the denoiser is told of them, `[batch]`: their numbers."""
        return timesteps

    def scales(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """`(α, σ)` of each example, fp32, shaped to multiply `like`: `[batch, 1, …]`."""
        squared = self.alphas_cumprod[timesteps].view(-1, *(1,) * (like.dim() - 1))
        return squared.sqrt(), (1 - squared).sqrt()

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t, in the dtype of `clean`."""
        alpha, sigma = self.scales(timesteps, clean)
        return (alpha * clean + sigma * noise).to(clean.dtype)

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect guess of this noise would be, in the denoiser's own form."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return clean
        alpha, sigma = self.scales(timesteps, clean)
        return (alpha * noise - sigma * clean).to(clean.dtype)

    def parts(self, answer: Tensor, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """`(clean, noise)` that a denoiser's answer takes a noisy image for, with which [`~NoiseSchedule.add_noise`] gives that image again."""
        alpha, sigma = self.scales(timesteps, noisy)
        if self.prediction_type == "v_prediction":
            return alpha * noisy - sigma * answer, sigma * noisy + alpha * answer
        if self.prediction_type == "sample":
            return answer, (noisy - alpha * answer) / sigma
        return (noisy - sigma * answer) / alpha, answer

    def shift(self, change: Tensor, timesteps: Tensor) -> Tensor:
        """By how much the denoiser's answer at a fixed x_t changes where the clean image it stands for changes by `change`:
        −(α/σ) Δ for ε, Δ for x₀, −Δ/σ for v.
        """
        if self.prediction_type == "sample":
            return change
        alpha, sigma = self.scales(timesteps, change)
        return -(alpha / sigma if self.prediction_type == "epsilon" else 1 / sigma) * change

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio ᾱ/(1 − ᾱ): `[batch]`."""
        squared = self.alphas_cumprod[timesteps]
        return squared / (1 - squared)

    def weights(self, timesteps: Tensor, kind: Literal["simple", "elbo", "min_snr"], gamma: float = 1.0) -> Tensor:
        r"""Weight of each example's squared error, `[batch]`, so that the error of any prediction type counts as one of ε would.

        `"simple"`: 1 on the prediction as it is (DDPM, eq. 14). `"min_snr"`: min(SNR, γ) on x₀ (arXiv 2303.09556).
        `"elbo"`: the variational bound's own $\beta_t^2 / (2\sigma_t^2\alpha_t(1-\bar\alpha_t))$ on ε (DDPM, eq. 12, with the
        posterior variance σ² = β); the step that ends at x₀ counts as its neighbour.
        """
        if kind == "simple":
            return torch.ones_like(timesteps, dtype=torch.float32)
        snr = self.snr(timesteps)
        # Squared errors: ε = x₀ · SNR, v = x₀ · (SNR + 1). The last SNR of a cosine schedule is 2e-9, of a rescaled one 0.
        of_x0 = {"epsilon": 1 / snr.clamp(min=1e-12), "sample": torch.ones_like(snr), "v_prediction": 1 / (snr + 1)}
        if kind == "min_snr":
            return snr.clamp(max=gamma) * of_x0[self.prediction_type]
        step = timesteps.clamp(min=1)
        now, previous = self.alphas_cumprod[step], self.alphas_cumprod[step - 1]
        # On x₀, ᾱ_{t−1} β / 2(1 − ᾱ_t)²: finite where ᾱ_t = 0, which the form on ε is not.
        bound = (previous - now) / (2 * (1 - now).square())
        bound = torch.where(timesteps > 0, bound, bound * snr / self.snr(step))
        return bound * of_x0[self.prediction_type]


@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    r"""Flow matching along straight lines (arXiv 2209.03003, 2403.03206): $x_t = (1 - \sigma) x_0 + \sigma \epsilon$, and the denoiser answers
    with the velocity $v = \epsilon - x_0$. Timestep i, from the image to noise, has the i-th of the σ that the scheduler would visit if it
    took all of its steps, shifted as it shifts them: so training sees what drawing visits.

    Attributes:
        sigmas (`Tensor`): σ, `[timesteps]`, fp32, ascending.
        scale (`float`): times σ it is the time that the denoiser is told.
    """

    sigmas: Tensor = field(default_factory=lambda: torch.empty(0))
    scale: float = 1000.0

    @classmethod
    def of(cls, scheduler: Any, tokens: int = 0) -> FlowSchedule:
        """The schedule that a flow-matching scheduler of diffusers draws from.

        Args:
            tokens (`int`): tokens of an image, by which a scheduler with dynamic shifting shifts.

        Raises:
            ValueError: the scheduler is of another kind, or runs backwards.
        """
        name, config = type(scheduler).__name__, scheduler.config
        if not name.startswith("FlowMatch"):
            raise ValueError(
                f"noise_scheduler: {name} matches no flow, which this denoiser needs; use FlowMatchEulerDiscreteScheduler"
            )
        if config.get("invert_sigmas"):
            raise ValueError("noise_scheduler: invert_sigmas=True is not supported; this denoiser is told 1 for noise")
        count = config.num_train_timesteps
        sigmas = torch.arange(1, count + 1, dtype=torch.float32) / count
        if config.get("use_dynamic_shifting"):
            slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
            mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
            sigmas = scheduler.time_shift(mu, 1.0, sigmas)
        else:
            shift = config.get("shift", 1.0)
            sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        return cls((1 - sigmas).square(), "flow", sigmas, float(count))

    def to(self, device: torch.device | str) -> FlowSchedule:
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device), sigmas=self.sigmas.to(device))

    def times(self, timesteps: Tensor) -> Tensor:
        """What the denoiser is told of them, `[batch]`: σ in the scheduler's units."""
        return self.scale * self.sigmas[timesteps]

    def scales(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.sigmas[timesteps].view(-1, *(1,) * (like.dim() - 1))
        return 1 - sigma, sigma

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - clean

    def parts(self, answer: Tensor, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        rest, sigma = self.scales(timesteps, noisy)
        return noisy - sigma * answer, noisy + rest * answer

    def shift(self, change: Tensor, timesteps: Tensor) -> Tensor:
        """−Δ/σ: at a fixed x_t, v = (x_t − x₀)/σ."""
        return -change / self.scales(timesteps, change)[1]

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio (1 − σ)²/σ²: `[batch]`."""
        sigma = self.sigmas[timesteps]
        return ((1 - sigma) / sigma).square()

    def weights(self, timesteps: Tensor, kind: Literal["simple", "elbo", "min_snr"], gamma: float = 1.0) -> Tensor:
        r"""Weight of each example's squared error of v, `[batch]`.

        `"simple"`: 1, as flow matching is trained; the sampler adds up errors of v, so they count alike. `"min_snr"`: min(SNR, γ) on x₀.
        `"elbo"`: half the fall of the SNR to this step, on x₀ (arXiv 2107.00630); the first step counts as its neighbour.
        """
        if kind == "simple":
            return torch.ones_like(timesteps, dtype=torch.float32)
        of_x0 = self.sigmas[timesteps].square()  # x₀ = x_t − σ v
        if kind == "min_snr":
            return self.snr(timesteps).clamp(max=gamma) * of_x0
        step = timesteps.clamp(min=1)
        return (self.snr(step - 1) - self.snr(step)) / 2 * of_x0
