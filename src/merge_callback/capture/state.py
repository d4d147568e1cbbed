"""Saves a capture to checkpoints and restores it, in the same way for whole and for sharded models.

Every captured tensor has a key, such as ``snapshot.100.layer.weight`` for the snapshot of step 100. For a whole model,
the callback's state holds the tensors under these keys. In a sharded run each rank holds a shard of every tensor. These
shards are saved beside the model's own, and the callback's state says where.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor

from merge_callback.capture.capture import SnapshotCapture
from merge_callback.capture.moving import shadow_like
from merge_callback.capture.storage import new_slots
from merge_callback.live.sharding import Sharding, local, rank, real_tensors
from merge_callback.live.weights import merged_parameters, snapshot_buffers

# Version of the state that checkpoints hold; states of other versions are not read.
STATE_FORMAT = 6
# The tensors by key, or the name of the entry in a sharded checkpoint that holds them.
SavedTensors: TypeAlias = str | Mapping[str, Tensor]


@dataclass(frozen=True)
class CapturedTensor:
    """A captured tensor with the key under which it is saved.

    Args:
        key: Key in the checkpoint.
        name: Name of the live tensor that has the same shape.
        part: The part that this process holds: its shard, or the whole tensor.
    """

    key: str
    name: str
    part: Tensor


def capture_state(capture: SnapshotCapture) -> dict[str, Any]:
    """Returns all that a capture needs to continue after an interruption, except its `captured_tensors`."""
    is_saved = capture.storage.in_checkpoints
    return {
        "window": capture.window.state_dict(),
        "snapshot": capture.kind.name,
        "steps": capture.steps,
        "begins": capture.ring.begins if capture.ring is not None else [],
        "interval": capture.kind.state_dict() if is_saved else {},
        "problems": capture.ring.problems() if capture.ring is not None else {},
        "shapes": _shapes(capture),
        "dtypes": _dtypes(capture),
        "buffers": capture.buffers if is_saved else {},
        "averages": capture.averages.state_dict() if is_saved else None,
    }


def captured_tensors(capture: SnapshotCapture) -> Iterator[CapturedTensor]:
    """Yields every captured tensor that checkpoints hold, by reference."""
    if not capture.storage.in_checkpoints:
        return
    if capture.ring is not None:
        for step, snapshot in capture.ring.snapshots():
            for name, tensor in snapshot.items():
                yield CapturedTensor(f"snapshot.{step}.{name}", name, tensor)
    for name, tensor in capture.kind.tensors().items():
        yield CapturedTensor(f"interval.{name}", name, tensor)
    for average, name, tensor in capture.averages.tensors():
        yield CapturedTensor(f"average.{average}.{name}", name, tensor)


def put_into_checkpoint(
    tensors: Iterable[CapturedTensor], sharding: Sharding, checkpoint: dict[str, Any]
) -> SavedTensors:
    """Adds the parts that all ranks hold to a Lightning checkpoint that is about to be saved.

    A sharded checkpoint stores them as the state of one more optimizer. Every rank writes that, and Lightning does not
    read it when it loads. For a checkpoint of whole tensors, rank 0 gathers them one at a time.

    Returns:
        Where `TensorReader` finds the tensors; keep it in the callback's state.
    """
    if any(isinstance(value, DTensor) for value in checkpoint["state_dict"].values()):
        entry = {each.key: sharding.as_dtensor(each.name, each.part) for each in tensors}
        checkpoint["optimizer_states"].append(entry)
        return f"optimizer_{len(checkpoint['optimizer_states']) - 1}"
    gathered = ((each.key, sharding.full_tensor(each.name, each.part)) for each in tensors)
    return {key: tensor.cpu() for key, tensor in gathered if rank() == 0}


def without_shards(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a loaded state in a form that can be saved again before training begins.

    Tensors that are stored as shards in the old file are left out.

    Args:
        state: State of a session. If it holds its tensors itself, it is returned unchanged.
    """
    if not isinstance(state.get("tensors"), str):
        return dict(state)
    capture = state["capture"] | {"buffers": {}, "averages": None}
    return {**state, "capture": capture, "tensors": {}}


class _ReaderOfOne(dcp.FileSystemReader):
    """Reads the metadata of a checkpoint once for all that is read from it; of a large model they take seconds."""

    _metadata: Any = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata


@dataclass(frozen=True)
class TensorReader:
    """Reads this process's part of the saved tensors.

    Args:
        saved: The tensors, or the name of their entry, as the state holds it.
        sharding: How the live tensors are sharded now.
        path: Path of the checkpoint; needed for tensors that it stores as shards.
    """

    saved: SavedTensors
    sharding: Sharding
    path: Any = None

    @cached_property
    def _reader(self) -> dcp.FileSystemReader | None:
        # torch finds another reader for a URL.
        return _ReaderOfOne(self.path) if Path(self.path).is_dir() else None

    def read(
        self, prefix: str, names: Iterable[str], empty: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Returns this process's part of the tensors that were saved under a prefix, by name of the live tensor.

        Args:
            prefix: First part of the keys, which are ``prefix.name`` with the name of the live tensor.
            names: Names of the live tensors.
            empty: Allocates the tensors that shards are read into; whole tensors stay where they were loaded.
        """
        if not isinstance(self.saved, str):
            return {name: self.sharding.own_part(name, self.saved[f"{prefix}.{name}"]) for name in names}
        parts = {name: self.sharding.as_dtensor(name, part) for name, part in empty().items()}
        if parts:
            keyed = {f"{prefix}.{name}": part for name, part in parts.items()}
            dcp.load({self.saved: keyed}, checkpoint_id=self.path, storage_reader=self._reader)
        return {name: local(part) for name, part in parts.items()}


@dataclass(frozen=True)
class OwnPartReader(TensorReader):
    """Reads saved tensors that are this process's parts already."""

    def read(
        self, prefix: str, names: Iterable[str], empty: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Returns the parts as they were saved."""
        assert not isinstance(self.saved, str)
        return {name: self.saved[f"{prefix}.{name}"] for name in names}


def restore_capture_(
    capture: SnapshotCapture, state: Mapping[str, Any], module: nn.Module, reader: TensorReader
) -> list[str]:
    """Restores a saved state, or those parts of it that still fit the model and the arguments.

    Args:
        capture: A new capture, prepared for the module.
        state: The state that `capture_state` returned.
        module: The live model.
        reader: Reads the `captured_tensors`.

    Returns:
        A clause for the user about each thing that was dropped or changed; empty if the window continues exactly.
    """
    num_saved, is_saved = len(state["steps"]), state["averages"] is not None
    problem = _difference(_shapes(capture), state["shapes"])
    changes = []
    if num_saved and capture.ring is None:
        changes.append(f"the {num_saved} snapshots of the window are left out: no merge needs them")
    elif num_saved and not is_saved:
        changes.append(f"the {num_saved} snapshots of the window were not saved: it starts empty")
    elif num_saved and state["snapshot"] != capture.kind.name:
        changes.append(
            f"its window of {num_saved} snapshots was dropped: they were taken with snapshot={state['snapshot']!r}"
        )
    elif num_saved and problem is not None:
        changes.append(f"its window of {num_saved} snapshots was dropped: {problem}")
    elif num_saved:
        changes += _restore_ring_(capture, state, reader)
    changes += capture.window.load_state_dict(state["window"], capture.steps, num_saved)
    is_continued = is_saved and problem is None and capture.ring is not None and state["snapshot"] == capture.kind.name
    if is_continued and bool(capture.steps) == bool(num_saved):
        _restore_interval_(capture, state, module, reader)
    averages = state["averages"] if is_saved and problem is None else {"profiles": {}, "buffers": {}}
    return changes + _restore_averages_(capture, averages, module, reader)


def _shapes(capture: SnapshotCapture) -> dict[str, list[int]]:
    """Returns the full shapes of the captured tensors by name; empty while they are not known."""
    if capture.layout is None:
        return {}
    return capture.sharding.shapes({name: place.shape for name, place in capture.layout.places.items()})


def _dtypes(capture: SnapshotCapture) -> list[str]:
    """Returns the names of the dtypes in which snapshots are kept."""
    groups = capture.layout.groups if capture.layout is not None else []
    return sorted({str(capture.dtype or own) for own, _ in groups})


def _difference(live: Mapping[str, list[int]], saved: Mapping[str, list[int]]) -> str | None:
    """Describes the first tensor whose shapes in model and snapshots differ; None if all agree."""
    if not saved:
        # Shapes were not known yet when the state was saved, so nothing was captured.
        return None
    for name in [*live, *saved]:
        if name not in live or name not in saved:
            return (
                f"{name} is in the {'snapshots, and not merged now' if name in saved else 'merge now, and not in them'}"
            )
        if live[name] != saved[name]:
            return f"{name} has shape {live[name]} in the model and {saved[name]} in the snapshots"
    return None


def _restore_ring_(capture: SnapshotCapture, state: Mapping[str, Any], reader: TensorReader) -> list[str]:
    assert capture.ring is not None
    assert capture.layout is not None
    layout = capture.layout

    def empty() -> dict[str, Tensor]:
        (row,) = new_slots(layout, 1, capture.dtype, capture.storage.merge_device)
        return layout.views(row)

    def read(step: int) -> Mapping[str, Tensor]:
        return reader.read(f"snapshot.{step}", layout.places, empty)

    changes = capture.ring.restore_(state["steps"], state["begins"], read, state["problems"])
    device = layout.groups[0][1]
    capture.buffers = {name: buffer.to(device, copy=True) for name, buffer in state["buffers"].items()}
    if state["dtypes"] != (now := _dtypes(capture)):
        changes.append(f"snapshots in {', '.join(state['dtypes'])} are now in {', '.join(now)}")
    return changes


def _restore_interval_(
    capture: SnapshotCapture, state: Mapping[str, Any], module: nn.Module, reader: TensorReader
) -> None:
    interval, device = state["interval"], capture.storage.average_device
    live = real_tensors(merged_parameters(module, capture.selection)) if interval.get("weight") else {}
    capture.kind.load_state_dict(interval, _read_wide(reader, "interval", live, device))


def _restore_averages_(
    capture: SnapshotCapture, state: Mapping[str, Any], module: nn.Module, reader: TensorReader
) -> list[str]:
    live, device = real_tensors(merged_parameters(module, capture.selection)), capture.averages.device

    def read(name: str) -> dict[str, Tensor]:
        return _read_wide(reader, f"average.{name}", live, device)

    return capture.averages.load_state_dict(state, read, snapshot_buffers(module))


def _read_wide(
    reader: TensorReader, prefix: str, live: Mapping[str, Tensor], device: torch.device | None
) -> dict[str, Tensor]:
    """Returns saved tensors in float32 or better, on a device or where the live ones are."""
    found = reader.read(prefix, live, lambda: {key: shadow_like(tensor, device) for key, tensor in live.items()})
    return {key: tensor.to(device or live[key].device, copy=True) for key, tensor in found.items()}
