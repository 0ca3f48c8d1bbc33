"""FORGET: one file a method, on the trainers that they share."""
