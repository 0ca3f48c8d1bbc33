"""Generators that no library of Hugging Face has: GANs as diffusers models, with their pipeline and their trainer."""

from ..hub.registering import register_with_diffusers


register_with_diffusers("DCGANDiscriminator", "DCGANGenerator")
