"""Checks of classifiers of images and texts: one file a kind."""
