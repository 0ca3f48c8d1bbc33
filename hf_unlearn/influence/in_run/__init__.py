"""Influence read off one training run: products of per-example gradients."""
