"""The console commands and their configs."""
