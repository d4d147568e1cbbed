"""A small language model on real text, trained with `MergeCallback` beside it: ``python -m merge_callback.demo``."""
