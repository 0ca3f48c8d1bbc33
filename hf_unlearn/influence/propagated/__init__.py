"""Influence propagated through the rest of the run, backwards."""
