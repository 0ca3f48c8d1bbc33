"""What recipes, tests and benchmarks start from: small data sets, and small models trained on first use."""
