"""Watch, live and for almost nothing, what a model would be if it were annealed now."""

from importlib.metadata import version

from merge_callback.callbacks.anneal_branch import AnnealBranch
from merge_callback.callbacks.merge_callback import MergeCallback
from merge_callback.callbacks.merged_checkpoint import MergedCheckpoint
from merge_callback.callbacks.merger import Merger
from merge_callback.callbacks.parts import Parts
from merge_callback.callbacks.progress_bar import LiveAndMergedBar
from merge_callback.callbacks.spike_detector import SpikeDetector
from merge_callback.callbacks.spike_recovery import SpikeRecovery
from merge_callback.capture.directory import SnapshotDirectory
from merge_callback.capture.places import SnapshotMemory
from merge_callback.merging.averages import Ema, PowerEma
from merge_callback.merging.recommended import recommended_window
from merge_callback.merging.windows import Extrapolate, Window
from merge_callback.validation.routers import Routers

__all__ = [
    "AnnealBranch",
    "Ema",
    "Extrapolate",
    "LiveAndMergedBar",
    "MergeCallback",
    "MergedCheckpoint",
    "Merger",
    "Parts",
    "PowerEma",
    "Routers",
    "SnapshotDirectory",
    "SnapshotMemory",
    "SpikeDetector",
    "SpikeRecovery",
    "Window",
    "recommended_window",
]
__version__ = version("merge-callback")
