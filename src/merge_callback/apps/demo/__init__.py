"""A small language model on real text, trained with `MergeCallback` beside it."""
