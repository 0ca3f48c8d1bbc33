"""The jobs of hf-unlearn filter: fit, run, evaluate."""
