"""Config groups of the commands that take a user's config. A config file in this folder could hide a user's own."""
