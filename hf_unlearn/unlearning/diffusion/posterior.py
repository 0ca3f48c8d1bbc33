r"""What a generator without one class would be: Bayes' rule on the frozen original, with no retained data.

Let $\pi(x_t)$ be the probability that a noisy image came from the forgotten part of what the model generates. The
original's guess of the clean image is a mixture, $\hat x_0 = \pi\,\hat x_0^{f} + (1 - \pi)\,\hat x_0^{k}$, so that of a model
trained on the kept part alone is

$$ \hat x_0^{k} \;=\; \hat x_0 + \pi(x_t)\,\big(\hat x_0^{k} - \hat x_0^{f}\big). $$

π and the two guesses in the correction have closed forms where the parts are finite sets of images, the forget images and the
original's own samples: the noise is Gaussian, so each image of a bank is as probable as
$\exp(-\lVert x_t - \alpha_t x \rVert^2 / 2\sigma_t^2)$, and the guess is their mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...training.noise import NoiseSchedule


def log_likelihoods(noisy: Tensor, bank: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """log p(x_t | x₀) of every noisy image under every image of a bank, up to a constant of each row.

    Args:
        noisy (`Tensor`): `[batch, …]`.
        bank (`Tensor`): `[size, …]`.
        alpha, sigma (`Tensor`): scales of each noisy image, `[batch, 1, …]`.

    Returns:
        `Tensor`: `[batch, size]`, fp32.
    """
    x, images = noisy.flatten(1).float(), bank.flatten(1).float()
    alpha, sigma = alpha.flatten(1), sigma.flatten(1)
    # ‖x − αz‖² without the term of x alone, which is the same for the whole row
    squared = alpha.square() * images.square().sum(1) - 2 * alpha * (x @ images.T)
    return -squared / (2 * sigma.square())


@dataclass(frozen=True)
class ForgottenPosterior:
    """The correction that Bayes' rule asks for, from two banks of images.

    Attributes:
        forget (`Tensor`): forget images, `[n, …]`.
        keep (`Tensor`): the original's own samples that are not of the forgotten kind, `[m, …]`.
        share (`float`): of the forgotten kind among what the original generates, in (0, 1).
    """

    forget: Tensor
    keep: Tensor
    share: float

    @torch.no_grad()
    def __call__(self, noisy: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        """`(π, change)`: the probability of the forgotten part, `[batch]`, and π(x̂ᵏ − x̂ᶠ), shaped like `noisy`, both fp32."""
        alpha, sigma = schedule.scales(timesteps, noisy)
        forget = log_likelihoods(noisy, self.forget, alpha, sigma)
        keep = log_likelihoods(noisy, self.keep, alpha, sigma)
        sizes = torch.tensor([len(self.forget), len(self.keep)], device=noisy.device).log()
        odds = torch.logit(torch.tensor(self.share, device=noisy.device))
        evidence = odds + forget.logsumexp(1) - keep.logsumexp(1) - sizes[0] + sizes[1]
        probability = evidence.sigmoid()
        guesses = [
            values.softmax(1) @ bank.flatten(1).float() for values, bank in ((keep, self.keep), (forget, self.forget))
        ]
        change = probability.unsqueeze(1) * (guesses[0] - guesses[1])
        return probability, change.view(noisy.shape)
