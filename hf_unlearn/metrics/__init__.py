"""Figures as pure functions: arrays in, numbers out."""
