"""What a recipe may ask for, read and checked before any library is imported; one file a kind of job says what its keys are."""
