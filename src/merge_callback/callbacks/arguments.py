"""Checks of what a user gives to `MergeCallback`: each error names the argument, the value and what was expected."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from merge_callback.capture.directory import SnapshotDirectory
from merge_callback.live.names import Selection
from merge_callback.merging.averages import Average, is_average
from merge_callback.merging.rules import Rule, resolve_rule
from merge_callback.utilities.checks import check_count, patterns
from merge_callback.validation.logged import safe_name

# More likely meant as a kind of memory than as the name of a folder.
_NO_FOLDERS = ("device", "cpu", "gpu", "cuda", "mps", "host", "ram", "memory", "pinned", "disk", "none")


def check_start(start: Any) -> None:
    """Raises unless it is ``"stable"`` or an optimizer step."""
    if start != "stable" and (not isinstance(start, int) or isinstance(start, bool)):
        raise TypeError(f"start must be 'stable' or an int, the optimizer step to begin at, got {start!r}")
    if start != "stable":
        check_count("start", start, minimum=0)


def snapshot_storage(storage: Any) -> str | SnapshotDirectory:
    """``"device"``, ``"cpu"`` or a directory, also from its path; raises unless snapshots can be kept there."""
    if isinstance(storage, str) and storage in ("device", "cpu"):
        return storage
    if not isinstance(storage, str | os.PathLike | SnapshotDirectory):
        raise TypeError(f"storage must be 'device', 'cpu' or a directory, got {storage!r}")
    if isinstance(storage, str) and (not storage or storage.partition(":")[0].lower() in _NO_FOLDERS):
        raise ValueError(
            f"storage must be 'device' (where the model is), 'cpu' (host memory) or a directory, got {storage!r}; a"
            f" folder of that name is './{storage}'"
        )
    directory = storage if isinstance(storage, SnapshotDirectory) else SnapshotDirectory(storage)
    if not str(directory.path):
        raise ValueError(f"storage must have a path, got {directory!r}")
    folder = Path(directory.path).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    # Of the kernel's own folders not all say the truth.
    is_kernels = folder.is_relative_to("/proc") or folder.is_relative_to("/sys")
    if not existing.is_dir() or not os.access(existing, os.W_OK) or is_kernels:
        raise ValueError(f"storage={str(directory.path)!r} cannot be written: {existing} is not a writable directory")
    return directory


def refuse_strategy(strategy: Any) -> None:
    """Raises if merges under the strategy would be wrong: it flattens parameters, or keeps them out of the model.

    Raises:
        NotImplementedError: The message says what to use instead.
    """
    names = {base.__name__ for base in type(strategy).__mro__}
    if refused := names & {"FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy"}:
        raise NotImplementedError(
            f"MergeCallback does not work under {refused.pop()}, whose parameters it cannot match by name;"
            " use ModelParallelStrategy (FSDP2, tensor parallel) or DDPStrategy, or leave the callback out"
        )


def check_calibration(calibration: Any) -> None:
    """Raises unless it can be a file of records, or names the prior."""
    if calibration is not None and not isinstance(calibration, str | os.PathLike):
        raise TypeError(f"calibration must be a file of records, 'prior' or None, got {calibration!r}")
    if calibration is not None and (not str(calibration) or Path(calibration).is_dir()):
        raise ValueError(f"calibration must be a file of records, not a folder, or 'prior', got {str(calibration)!r}")


def selection(include: Any, exclude: Any) -> Selection:
    """Which parameters are merged, by patterns; raises unless at least one includes some."""
    chosen = Selection(patterns("include", include), patterns("exclude", exclude))
    if not chosen.include:
        raise ValueError(f"include must name at least one pattern, got {include!r}")
    return chosen


def floating_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype itself, also from its name; None stays None."""
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(resolved, torch.dtype) and resolved.is_floating_point):
        raise ValueError(f"dtype must be a floating-point torch.dtype or its name, such as 'bfloat16', got {dtype!r}")
    return resolved


def named_merges(merges: Any) -> dict[str, Rule | Average]:
    """Merges by name, from one of them or a mapping of names to them."""
    if isinstance(merges, list | tuple):
        raise TypeError(
            f"several merges are a mapping of names to them, such as {{'a': 'sma', 'b': 'wma'}}, got {merges!r}"
        )
    if not isinstance(merges, Mapping):
        label = merges if isinstance(merges, str) else getattr(merges, "__name__", type(merges).__name__.lower())
        return {label: _merge(merges)}
    if not merges:
        raise ValueError("merges must name at least one merge, got an empty mapping")
    for name in merges:
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"merges must be named by non-empty strings without a slash, got {name!r}")
    _, *further = merges
    logged = [safe_name(name) for name in further]
    if twice := next((name for name, safe in zip(further, logged, strict=True) if logged.count(safe) > 1), None):
        raise ValueError(
            f"merges must have different names in logs, where characters that not all loggers take become '_';"
            f" {twice!r} and another one are both {safe_name(twice)!r} there"
        )
    return {name: _merge(merge) for name, merge in merges.items()}


def _merge(merge: Any) -> Rule | Average:
    if isinstance(merge, type):
        raise TypeError(f"merges takes objects, got the class {merge.__name__}; make one, {merge.__name__}(...)")
    return merge if is_average(merge) else resolve_rule(merge)
