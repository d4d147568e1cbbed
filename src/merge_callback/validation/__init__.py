"""Validates merges beside the live model, and logs the results."""
