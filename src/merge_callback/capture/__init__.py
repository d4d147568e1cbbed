"""What is kept of a run for its merges."""
