"""Language models that forget."""
