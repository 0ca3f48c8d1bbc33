"""Draws images with a GAN."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..modes import in_eval_mode


class GANPipeline(DiffusionPipeline):
    """A generator, and the discriminator it was trained against, where that is there.

    ```python
    pipe = GANPipeline.from_pretrained("me/digits-gan")
    pipe(num_images=4, generator=torch.Generator().manual_seed(0)).images[0]
    ```

    Args:
        generator ([`DCGANGenerator`]): or any diffusers model with `latent_shape` (a tuple), `config.channels`,
            `config.sample_size` and a `forward(latents, truncation=)` that gives `.sample`, and for path lengths `.styles`.
        discriminator ([`DCGANDiscriminator`], *optional*): not needed to draw, but to go on training.
    """

    _optional_components = ["discriminator"]
    model_cpu_offload_seq = "generator"

    def __init__(self, generator, discriminator=None):
        super().__init__()
        self.register_modules(generator=generator, discriminator=discriminator)
        self.image_processor = VaeImageProcessor(do_resize=False, vae_scale_factor=1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)` of what is drawn."""
        config = self.generator.config
        return config.channels, config.sample_size, config.sample_size

    def prepare_latents(self, num_images: int, generator: torch.Generator | None = None) -> Tensor:
        """z ~ N(0, 1), `[num_images, *latent_shape]`, drawn on the device of `generator`."""
        shape = (num_images, *self.generator.latent_shape)
        return randn_tensor(shape, generator=generator, device=self.generator.device, dtype=self.generator.dtype)

    @torch.no_grad()
    def draw(self, latents: Tensor, *, truncation: float = 1.0, batch_size: int = 64) -> Tensor:
        """Images of latents, in eval mode.

        Args:
            latents (`Tensor`): `[n, *latent_shape]`, on any device.
            truncation (`float`, defaults to 1.0): how far w is drawn to its mean: less variety, more typical images.
            batch_size (`int`, defaults to 64): images at a time.

        Returns:
            `Tensor`: `[n, channels, size, size]` in [−1, 1], fp32, on the CPU.

        Raises:
            ValueError: latents of another shape.
        """
        network = self.generator
        if latents.shape[1:] != network.latent_shape or not len(latents):
            raise ValueError(
                f"latents: have shape {list(latents.shape)}, must be [n, {str([*network.latent_shape])[1:]}"
            )
        with in_eval_mode(network):
            parts = [
                network(part.to(network.device, network.dtype), truncation=truncation)
                .sample.float()
                .clamp(-1, 1)
                .cpu()
                for part in latents.split(batch_size)
            ]
        return torch.cat(parts)

    def __call__(
        self,
        num_images: int = 1,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        *,
        truncation: float = 1.0,
        batch_size: int = 64,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Args:
            num_images (`int`, defaults to 1): how many; with `latents`, as many as there are.
            generator (`torch.Generator`, *optional*): source of the latents. Default: PyTorch's own.
            latents (`Tensor`, *optional*): z, `[n, *latent_shape]`, instead.
            truncation, batch_size: see [`~GANPipeline.draw`].
            output_type (`"pil"` | `"np"` | `"pt"`, defaults to `"pil"`): pictures, an array `[n, size, size, channels]` or a
                tensor `[n, channels, size, size]`, both in [0, 1].
            return_dict (`bool`, defaults to `True`): an `ImagePipelineOutput`, or a tuple.

        Raises:
            ValueError: no images asked for, or latents of another shape.
        """
        if latents is None:
            if num_images < 1:
                raise ValueError(f"num_images={num_images}: must be ≥ 1")
            latents = self.prepare_latents(num_images, generator)
        images = self.draw(latents, truncation=truncation, batch_size=batch_size)
        images = self.image_processor.postprocess(images, output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
