"""From marked samples to scores and thresholds."""
