"""Configs of the commands; only the commands themselves see them."""
