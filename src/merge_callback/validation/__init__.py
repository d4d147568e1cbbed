"""Merges validated beside the live model, and logged."""
