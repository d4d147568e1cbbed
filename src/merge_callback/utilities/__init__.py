"""Checks, files, messages and tables."""
