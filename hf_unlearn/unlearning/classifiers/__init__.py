"""Classifiers that forget."""
