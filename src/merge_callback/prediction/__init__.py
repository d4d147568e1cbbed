"""From merges and real anneals to annealed values."""
