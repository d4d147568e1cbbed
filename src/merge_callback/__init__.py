"""Watch, live and for almost nothing, what a model would be if it were annealed now."""

from importlib.metadata import version

from merge_callback.anneal import AnnealBranch
from merge_callback.callback import MergeCallback
from merge_callback.checkpoint import MergedCheckpoint
from merge_callback.rules import Window

__all__ = ["AnnealBranch", "MergeCallback", "MergedCheckpoint", "Window"]
__version__ = version("merge-callback")
