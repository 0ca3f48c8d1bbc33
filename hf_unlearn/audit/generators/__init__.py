"""Checks of generators of images (diffusion models, text-to-image pipelines, GANs): one file a kind."""
