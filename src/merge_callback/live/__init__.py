"""The run under training: read, swapped, put back, evaluated."""
