"""A small project in the layout of the Lightning and Hydra template that many teams start from."""
