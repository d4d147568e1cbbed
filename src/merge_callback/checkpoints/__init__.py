"""Reads, merges and writes checkpoints on disk."""
