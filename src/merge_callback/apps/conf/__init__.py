"""Hydra configuration: the groups `callbacks/merge` and the demo's run."""
