"""Two laws, the trade-off curve between them, its μ, and intervals."""
