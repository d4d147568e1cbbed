"""Config groups of the commands that take a user's config: no file here, which could hide one of the user's."""
