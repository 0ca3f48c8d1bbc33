"""Generators of which it is known what they draw: diffusion models of a few pictures, whose denoiser is Bayes' rule."""

import torch
from diffusers import ConfigMixin, DDIMScheduler, DDPMPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from hf_unlearn.training.noise import NoiseSchedule


SIZE, SPREAD = 4, 0.05  # pixels in a row; the standard deviation of an image around its picture
KIND = 0  # the class that is to be forgotten


class FewPictures(ModelMixin, ConfigMixin):
    """E[ε | x_t] where x₀ is one of some pictures, plus noise: the softmax of the layer `pictures` says which, its bias how often."""

    @register_to_config
    def __init__(self, number: int = 3, sample_size: int = SIZE, in_channels: int = 1, out_channels: int = 1):
        super().__init__()
        self.pictures = nn.Linear(sample_size**2, number)
        self.schedule = NoiseSchedule.of(DDIMScheduler())

    def forward(self, sample, timestep, return_dict=True):
        times = torch.as_tensor(timestep).expand(len(sample))
        squared = self.schedule.alphas_cumprod[times].view(-1, 1)
        alpha, rest, x = squared.sqrt(), 1 - squared, sample.flatten(1)
        means, variance = self.pictures.weight, squared * SPREAD**2 + rest
        logits = (alpha * (x @ means.T) - squared * means.square().sum(1) / 2) / variance + self.pictures.bias
        mean = logits.softmax(-1) @ means
        clean = mean + alpha * SPREAD**2 / variance * (x - alpha * mean)
        noise = ((x - alpha * clean) / rest.sqrt()).view_as(sample)
        return UNet2DOutput(sample=noise) if return_dict else (noise,)


def pictures():
    """Three: bright on the left, bright at the top, a chessboard."""
    grid = torch.linspace(1, -1, SIZE)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return torch.stack([grid.expand(SIZE, SIZE), grid[:, None].expand(SIZE, SIZE), 1.0 - 2 * ((rows + columns) % 2)])


def classes(images):
    """The marker: the nearest of the pictures."""
    return torch.cdist(images.flatten(1), pictures().flatten(1)).argmin(1)


def pipeline(*, seed=0, without=None, bias=None):
    """Draws all pictures, as a training with this seed would have them, or `without` one; `bias` is added to the kind's logit."""
    generator = torch.Generator().manual_seed(seed)
    shown = pictures() + 0.02 * torch.randn(3, SIZE, SIZE, generator=generator)
    model = FewPictures()
    with torch.no_grad():
        model.pictures.weight.copy_(shown.flatten(1))
        model.pictures.bias.copy_(0.05 * torch.randn(3, generator=generator))
        if without is not None:  # drawn by nobody: its place is another one's
            model.pictures.weight[without] = model.pictures.weight[(without + 1) % 3]
        if bias is not None:
            model.pictures.bias[KIND] += bias
    return DDPMPipeline(model.eval(), DDIMScheduler())


def images(of, number=60, seed=0):
    """Images of some classes."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.tensor([of[row % len(of)] for row in range(number)])
    noise = torch.randn(number, 1, SIZE, SIZE, generator=generator)
    return (pictures()[which][:, None] + SPREAD * noise).clamp(-1, 1), which
