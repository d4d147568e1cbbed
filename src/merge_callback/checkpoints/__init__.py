"""Checkpoints on disk: read, merged, written."""
