"""Hydra configs of the commands; other apps do not see them."""
