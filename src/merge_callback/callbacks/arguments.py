"""Checks the arguments of `MergeCallback`, with errors that name argument and value, and builds a session from them."""

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import combinations
from typing import Any

import torch

from merge_callback.callbacks.parts import Parts
from merge_callback.capture.directory import SnapshotDirectory
from merge_callback.capture.kinds import MeanSnapshots, PointSnapshots
from merge_callback.capture.places import SnapshotMemory, StoragePlace
from merge_callback.merging.averages import Average, is_average
from merge_callback.merging.decays import DECAY_SHAPES
from merge_callback.merging.rules import Rule, resolve_rule
from merge_callback.utilities.checks import check_count, check_optional_count, patterns
from merge_callback.utilities.locations import local_path
from merge_callback.validation.logged import safe_name

# Values of ``storage`` that are more likely meant as a kind of memory than as the name of a folder.
_NO_FOLDERS = ("device", "cpu", "gpu", "cuda", "mps", "host", "ram", "memory", "pinned", "disk", "none")


def check_start(start: Any) -> None:
    """Raises TypeError or ValueError unless ``start`` is ``"stable"``, ``"any"`` or an optimizer step."""
    if isinstance(start, str) and start in ("stable", "any"):
        return
    if not isinstance(start, int) or isinstance(start, bool):
        raise TypeError(f"start must be 'stable', 'any' or an int, the optimizer step to begin at, got {start!r}")
    check_count("start", start, minimum=0)


def snapshot_kind(snapshot: Any, mean_samples: Any, place: StoragePlace) -> PointSnapshots:
    """Returns the kind of snapshots that the arguments ``snapshot`` and ``mean_samples`` name."""
    if snapshot not in ("point", "mean"):
        raise ValueError(f"snapshot must be 'point' or 'mean', got {snapshot!r}")
    check_optional_count("mean_samples", mean_samples)
    if snapshot == "mean":
        return MeanSnapshots(mean_samples, place.average_device)
    if mean_samples is not None:
        raise ValueError(f"mean_samples={mean_samples} needs snapshot='mean', got snapshot='point'")
    return PointSnapshots()


def check_name(name: Any) -> None:
    """Raises ValueError unless ``name`` is a non-empty string."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be a non-empty string, got {name!r}")
    _refuse_taken("name", name)


def refuse_same_names(labels: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError if two callbacks of a Trainer would log values under the same name.

    Args:
        labels: Name of each callback -> the labels of its merges in logged names.
    """
    for (name, own), (other, theirs) in combinations(labels.items(), 2):
        if same := [label for label in own if label in theirs]:
            raise ValueError(
                f"MergeCallback(name={name!r}) and MergeCallback(name={other!r}) would both log merged{same[0]}/...;"
                " give one of them, or its merge, another name"
            )


def _refuse_taken(what: str, name: str) -> None:
    if f"{safe_name(name)}_".startswith("stderr_"):
        raise ValueError(f"{what} must not begin with 'stderr', which is the name of a gain's error, got {name!r}")


def snapshot_place(storage: Any) -> StoragePlace:
    """Returns the place that ``"device"``, ``"cpu"`` or a directory's path names; raises if it names none."""
    if isinstance(storage, SnapshotMemory):
        return storage
    if isinstance(storage, str) and storage in ("device", "cpu"):
        return SnapshotMemory(storage)  # type: ignore[arg-type]
    if not isinstance(storage, str | os.PathLike | SnapshotDirectory):
        raise TypeError(f"storage must be 'device', 'cpu', a directory or a SnapshotMemory, got {storage!r}")
    if isinstance(storage, str) and (not storage or storage.partition(":")[0].lower() in _NO_FOLDERS):
        raise ValueError(
            f"storage must be 'device' (where the model is), 'cpu' (host memory) or a directory, got {storage!r}; a"
            f" folder of that name is './{storage}'"
        )
    directory = storage if isinstance(storage, SnapshotDirectory) else SnapshotDirectory(storage)
    if not str(directory.path):
        raise ValueError(f"storage must have a path, got {directory!r}")
    folder = local_path("storage", directory.path).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    # The kernel's own folders claim to be writable.
    is_kernels = folder.is_relative_to("/proc") or folder.is_relative_to("/sys")
    if not existing.is_dir() or not os.access(existing, os.W_OK) or is_kernels:
        raise ValueError(f"storage={str(directory.path)!r} cannot be written: {existing} is not a writable directory")
    return directory


def refuse_strategy(strategy: Any) -> None:
    """Raises if merges would be wrong under the strategy: it flattens parameters, or keeps them outside the model.

    Raises:
        NotImplementedError: If it is such a strategy; the message says what to use instead.
    """
    names = {base.__name__ for base in type(strategy).__mro__}
    if refused := names & {"FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy"}:
        raise NotImplementedError(
            f"MergeCallback does not work under {refused.pop()}, whose parameters it cannot match by name;"
            " use ModelParallelStrategy (FSDP2, tensor parallel) or DDPStrategy, or leave the callback out"
        )


def check_calibration(calibration: Any) -> None:
    """Raises TypeError or ValueError unless ``calibration`` is None, ``"prior"`` or the path of a file."""
    if calibration is not None and not isinstance(calibration, str | os.PathLike):
        raise TypeError(f"calibration must be a file of records, 'prior' or None, got {calibration!r}")
    is_like_prior = isinstance(calibration, str) and get_close_matches(calibration, ["prior"], cutoff=0.8)
    if is_like_prior and calibration != "prior":
        raise ValueError(
            f"calibration must be 'prior' or a file of records, got {calibration!r}; a file of that name is"
            f" './{calibration}'"
        )
    if calibration is not None and (not str(calibration) or local_path("calibration", calibration).is_dir()):
        raise ValueError(f"calibration must be a file of records, not a folder, or 'prior', got {str(calibration)!r}")


def check_length(what: str, length: Any) -> None:
    """Raises TypeError or ValueError unless ``length`` is that of a decay: a share of all steps, or steps, or None."""
    if length is None:
        return
    if isinstance(length, float):
        if not 0 < length < 1:
            raise ValueError(f"{what} must be a share of the steps in (0, 1), or a number of steps, got {length!r}")
    else:
        check_count(what, length)


def decay_length(span_steps: Any, span: Any, default: float | int | None) -> float | int:
    """Returns the length of a decay from one of ``span_steps`` and ``span``, or the default if both are None."""
    if span_steps is not None and span is not None:
        raise ValueError(f"forecast takes span_steps or span, not both, got {span_steps} and {span}")
    if span is not None and not (isinstance(span, float) and 0 < span < 1):
        raise ValueError(f"span must be a share of the steps in (0, 1), got {span!r}")
    if span_steps is not None:
        check_count("span_steps", span_steps)
    length = span if span is not None else span_steps
    if length is None and default is None:
        raise ValueError("forecast needs span_steps or span, since the callback has no forecast=")
    return length if length is not None else default  # type: ignore[return-value]


def check_shape(shape: Any, final_rate: Any) -> None:
    """Raises ValueError unless these describe a decay of the rate."""
    if not isinstance(shape, str) or shape not in DECAY_SHAPES:
        raise ValueError(f"shape must be one of {', '.join(DECAY_SHAPES)}, got {shape!r}")
    if isinstance(final_rate, bool) or not isinstance(final_rate, int | float) or not 0 <= final_rate <= 1:
        raise ValueError(f"final_rate must be a share of the rate in [0, 1], got {final_rate!r}")


def parts_to_merge(parts: Any) -> Parts:
    """Returns the parts to merge, from `Parts` or from one or several name patterns."""
    if isinstance(parts, Parts):
        return parts
    return Parts(include=patterns("parts", parts))


def floating_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Returns the floating-point dtype, from itself or from its name; None stays None."""
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(resolved, torch.dtype) and resolved.is_floating_point):
        raise ValueError(f"dtype must be a floating-point torch.dtype or its name, such as 'bfloat16', got {dtype!r}")
    return resolved


def named_merges(merges: Any) -> dict[str, Rule | Average]:
    """Returns the merges by name, from a single merge or from a mapping of names to merges."""
    if isinstance(merges, list | tuple | set):
        raise TypeError(
            f"several merges must be a mapping of names to merges, such as {{'a': 'sma', 'b': 'wma'}}, got {merges!r}"
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
    for name in further:
        _refuse_taken("names of merges", name)
    logged = [safe_name(name) for name in further]
    if twice := next((name for name, safe in zip(further, logged, strict=True) if logged.count(safe) > 1), None):
        raise ValueError(
            f"merges must have different names in logs, where characters that some loggers refuse become '_';"
            f" {twice!r} and another one are both {safe_name(twice)!r} there"
        )
    return {name: _merge(merge) for name, merge in merges.items()}


def _merge(merge: Any) -> Rule | Average:
    if isinstance(merge, type):
        raise TypeError(f"merges takes objects, got the class {merge.__name__}; make one, {merge.__name__}(...)")
    return merge if is_average(merge) else resolve_rule(merge)
