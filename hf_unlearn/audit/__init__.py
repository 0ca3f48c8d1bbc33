"""VERIFY: one file an attack or check. Each takes numbers that a model gave, not the model."""
