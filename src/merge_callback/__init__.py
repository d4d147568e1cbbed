"""Watch, live and for almost nothing, what a model would be if it were annealed now."""

from importlib.metadata import version

from merge_callback.anneal import AnnealBranch
from merge_callback.callback import MergeCallback
from merge_callback.checkpoint import MergedCheckpoint
from merge_callback.presets import recommended_window
from merge_callback.progress import LiveAndMergedBar
from merge_callback.recovery import SpikeRecovery
from merge_callback.routers import Routers
from merge_callback.rules import Extrapolate, Window
from merge_callback.shadow import Ema, PowerEma
from merge_callback.spikes import SpikeDetector
from merge_callback.storage import SnapshotDirectory

__all__ = [
    "AnnealBranch",
    "Ema",
    "Extrapolate",
    "LiveAndMergedBar",
    "MergeCallback",
    "MergedCheckpoint",
    "PowerEma",
    "Routers",
    "SnapshotDirectory",
    "SpikeDetector",
    "SpikeRecovery",
    "Window",
    "recommended_window",
]
__version__ = version("merge-callback")
