"""Filters that judge what a generator draws, for what it cannot be made to forget."""

from ..hub.registering import register_with_diffusers


register_with_diffusers("FASTSafetyChecker")
