"""Predicts the metrics after an anneal (a decay of the learning rate) from merges and records of real anneals."""
