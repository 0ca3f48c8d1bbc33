"""Diffusion models that forget."""
