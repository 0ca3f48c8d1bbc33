"""FIND: which examples taught it."""
