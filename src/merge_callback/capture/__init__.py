"""Captures the weights that merges are made from, keeps them, and makes the merges."""
