"""Snapshots' steps to coefficients, and weighted sums: shared by live and offline merges."""
