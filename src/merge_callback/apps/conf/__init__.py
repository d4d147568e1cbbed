"""Hydra config groups for any app: `callbacks/merge` and `hydra/callbacks`."""
