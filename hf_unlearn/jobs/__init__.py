"""What the keys of a recipe mean, and the jobs that run them: one file a verb."""
