"""Influence on a model that is already trained: curvature by Kronecker factors, segments between checkpoints, an index on disk."""
