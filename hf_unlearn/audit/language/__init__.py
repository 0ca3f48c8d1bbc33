"""Checks of causal language models: one file a kind."""
