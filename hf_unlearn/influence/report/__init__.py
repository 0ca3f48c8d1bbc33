"""What a run observed, on disk and as a report."""
