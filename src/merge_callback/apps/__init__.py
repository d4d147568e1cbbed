"""Commands and their configs."""
