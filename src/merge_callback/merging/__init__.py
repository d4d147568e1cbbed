"""Merge rules and weighted sums, shared by live and offline merges."""
