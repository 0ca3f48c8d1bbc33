"""Publish: provenance, model card, merged weights and a push that takes an allow-list."""
