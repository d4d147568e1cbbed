"""Reads the live model, swaps its weights, evaluates it, and restores everything afterwards."""
