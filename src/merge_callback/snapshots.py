"""The rolling buffer: snapshots as flat rows, and the one pass that combines them.

A model's tensors lie one after the other in one flat row per dtype and device (`RowLayout`), so that capturing is one
copy and merging streams over long rows whatever the number of tensors. `SnapshotRing` keeps the order of the
snapshots; where the rows live is the business of a `SnapshotStorage`. Here that is the model's own device; pinned host
memory and a directory fit behind the same interface.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from merge_callback.weights import size_bytes

# Elements merged at a time: small enough that the chunk being summed stays in a CPU's cache.
CHUNK_NUMEL = 2**18
# Tensors start at multiples of this many elements, so that kernels find them aligned as in the live model.
ALIGNMENT_NUMEL = 16
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class _Place:
    group: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


class RowLayout:
    """Where each tensor lies in a flat row; a row is one flat tensor per dtype and device of the live tensors.

    Args:
        tensors: Name -> live tensor; only shapes, strides, dtypes and devices are read.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.groups: list[tuple[torch.dtype, torch.device]] = []
        self.num_elements: list[int] = []
        self.places: dict[str, _Place] = {}
        for name, tensor in tensors.items():
            key = (tensor.dtype, tensor.device)
            if key not in self.groups:
                self.groups.append(key)
                self.num_elements.append(0)
            group = self.groups.index(key)
            # Rows keep a tensor's memory order (channels last, transposed), so copying stays one linear pass.
            stride = torch.empty_like(tensor, device="meta").stride()
            self.places[name] = _Place(group, self.num_elements[group], tensor.shape, stride)
            self.num_elements[group] += _padded(tensor.numel())

    def views(self, row: Sequence[Tensor]) -> dict[str, Tensor]:
        """The tensors inside a row, by name: views, shaped and strided as the live ones."""
        return {
            name: row[place.group].as_strided(
                place.shape, place.stride, row[place.group].storage_offset() + place.offset
            )
            for name, place in self.places.items()
        }

    def runs(self, labels: Mapping[str, int]) -> list[tuple[int, int, int, int]]:
        """Stretches of the row whose tensors have the same label (1 if none): group, first element, end, label.

        Padding belongs to the tensor before it.
        """
        found: list[tuple[int, int, int, int]] = []
        for group in range(len(self.groups)):
            for name, place in self.places.items():
                if place.group != group:
                    continue
                label = labels.get(name, 1)
                stop = place.offset + _padded(place.shape.numel())
                if found and (found[-1][0], found[-1][3]) == (group, label):
                    found[-1] = (*found[-1][:2], stop, label)
                else:
                    found.append((group, place.offset, stop, label))
        return found

    def new_row(self) -> list[Tensor]:
        """An uninitialised row in the live tensors' dtypes, on their devices."""
        return [
            torch.empty(numel, dtype=dtype, device=device)
            for (dtype, device), numel in zip(self.groups, self.num_elements, strict=True)
        ]

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether tensors have the names, shapes, dtypes and devices that this layout was made for."""
        return self.places.keys() == tensors.keys() and all(
            place.shape == tensors[name].shape
            and self.groups[place.group] == (tensors[name].dtype, tensors[name].device)
            for name, place in self.places.items()
        )


def _padded(numel: int) -> int:
    return math.ceil(numel / ALIGNMENT_NUMEL) * ALIGNMENT_NUMEL


class SnapshotStorage(Protocol):
    """Where rows live. Slots are numbered from zero to the ring's capacity."""

    layout: RowLayout

    @property
    def size_bytes(self) -> int: ...

    def write(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies live tensors into a slot."""

    def rows(self, group: int, slots: Sequence[int]) -> list[Tensor]:
        """The flat rows of some slots for one group of the layout, on the device where they are merged."""

    def state_dict(self) -> list[Tensor]: ...

    def load_slot(self, slot: int, state: Sequence[Tensor], from_slot: int) -> None: ...


class DeviceStorage:
    """Rows in the memory of the model's own device: one ``[capacity, num_elements]`` tensor per group, made once.

    Args:
        layout: Where each tensor lies in a row.
        capacity: Number of rows.
        dtype: Dtype in which snapshots are kept; None keeps each tensor's own.
    """

    def __init__(self, layout: RowLayout, capacity: int, dtype: torch.dtype | None = None) -> None:
        self.layout = layout
        # Zeroed on purpose: the pages are touched now and not at the first capture, and no stale memory is ever saved.
        self._rings = [
            torch.empty(capacity, numel, dtype=dtype or own_dtype, device=device).zero_()
            for (own_dtype, device), numel in zip(layout.groups, layout.num_elements, strict=True)
        ]
        self._views = [list(layout.views([ring[slot] for ring in self._rings]).values()) for slot in range(capacity)]

    @property
    def size_bytes(self) -> int:
        """Bytes of all rows."""
        return size_bytes(self._rings)

    @staticmethod
    def required_bytes(layout: RowLayout, capacity: int, dtype: torch.dtype | None = None) -> dict[torch.device, int]:
        """Bytes that the rows will take on each device."""
        required: dict[torch.device, int] = {}
        for (own_dtype, device), numel in zip(layout.groups, layout.num_elements, strict=True):
            required[device] = required.get(device, 0) + capacity * numel * (dtype or own_dtype).itemsize
        return required

    def write(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies live tensors into a slot; each byte is read once and written once."""
        torch._foreach_copy_(self._views[slot], [tensors[name].detach() for name in self.layout.places])

    def rows(self, group: int, slots: Sequence[int]) -> list[Tensor]:
        """The rows of some slots: views, nothing is copied."""
        return [self._rings[group][slot] for slot in slots]

    def state_dict(self) -> list[Tensor]:
        """The rings themselves, not copies: writing a checkpoint needs no second ring in memory."""
        return self._rings

    def load_slot(self, slot: int, state: Sequence[Tensor], from_slot: int) -> None:
        """Copies one row of a saved state into a slot."""
        for ring, saved in zip(self._rings, state, strict=True):
            ring[slot].copy_(saved[from_slot])


class SnapshotRing:
    """The latest snapshots in order, oldest first, at most ``capacity`` of them.

    Args:
        storage: Where the rows live.
        capacity: Number of snapshots kept.
    """

    def __init__(self, storage: SnapshotStorage, capacity: int) -> None:
        self.storage = storage
        self.capacity = capacity
        self.steps: list[int] = []
        self._slots: list[int] = []

    @property
    def is_full(self) -> bool:
        """Whether the next snapshot replaces the oldest one."""
        return len(self.steps) == self.capacity

    def append(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Stores the tensors as the snapshot of a step, in place of the oldest one where the ring is full."""
        if self.is_full:
            self._keep(range(1, self.capacity))
        slot = min(set(range(self.capacity)) - set(self._slots))
        self.storage.write(slot, tensors)
        self.steps.append(step)
        self._slots.append(slot)

    def thin(self) -> None:
        """Drops every second snapshot and keeps the oldest, so that half the ring covers what the whole one did."""
        self._keep(range(0, len(self.steps), 2))

    def clear(self) -> None:
        """Drops all snapshots."""
        self._keep(range(0))

    def _keep(self, positions: range) -> None:
        self.steps = [self.steps[position] for position in positions]
        self._slots = [self._slots[position] for position in positions]

    def combine(self, coefficients: Sequence[float]) -> list[Tensor]:
        """The merge ``sum_j c_j x_j`` as a row in the live tensors' dtypes, accumulated in float32 or better.

        Each snapshot with a coefficient is read once and the merge is written once; beside it only chunks are needed.

        Args:
            coefficients: One per snapshot, oldest first, summing to one.

        Returns:
            A new row; `RowLayout.views` shows the tensors in it.
        """
        merged = self.storage.layout.new_row()
        used = [value for value in coefficients if value != 0]
        for group, out in enumerate(merged):
            rows = self._rows(group, coefficients)
            for start in range(0, out.numel(), CHUNK_NUMEL):
                chunk = slice(start, start + CHUNK_NUMEL)
                combine_(out[chunk], [row[chunk] for row in rows], used)
        return merged

    def spread(
        self,
        coefficients: Sequence[float],
        merged: Sequence[Tensor],
        copies: Mapping[str, int] | None = None,
        add_up: Callable[[Tensor], Tensor] = lambda sums: sums,
    ) -> float:
        """RMS distance of the snapshots in a merge from the merge, over the norm of the merge.

        Args:
            coefficients: As given to `combine`; snapshots with a coefficient of zero do not count.
            merged: The row that `combine` returned.
            copies: Of a sharded model: name -> how many ranks hold the same elements of that tensor.
            add_up: Sums a tensor over ranks.
        """
        # Squared distance and squared norm.
        sums = torch.zeros(2, dtype=torch.float64)
        for group, start, stop, shared_by in self.storage.layout.runs(copies or {}):
            rows, center = self._rows(group, coefficients), merged[group]
            found = torch.zeros(2, dtype=torch.float64, device=center.device)
            for first in range(start, stop, CHUNK_NUMEL):
                chunk = slice(first, min(first + CHUNK_NUMEL, stop))
                middle = center[chunk].to(torch.promote_types(center.dtype, torch.float32))
                for row in rows:
                    difference = row[chunk].to(middle.dtype) - middle
                    found[0] += difference.square_().sum(dtype=torch.float64) / len(rows)
                found[1] += middle.square().sum(dtype=torch.float64)
            sums += found.cpu() / shared_by
        distance, norm = add_up(sums).tolist()
        return math.sqrt(distance / norm) if norm else 0.0

    def _rows(self, group: int, coefficients: Sequence[float]) -> list[Tensor]:
        slots = [slot for slot, value in zip(self._slots, coefficients, strict=True) if value != 0]
        return self.storage.rows(group, slots)

    def state_dict(self) -> dict[str, Any]:
        """Rows by reference, and which of them are which snapshots."""
        return {
            "steps": list(self.steps),
            "slots": list(self._slots),
            "shapes": {name: list(place.shape) for name, place in self.storage.layout.places.items()},
            "rows": self.storage.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Takes over the newest snapshots of a saved ring, as many as fit.

        Returns:
            What was dropped or changed on the way, in words.

        Raises:
            ValueError: If the saved snapshots are of other tensors; the message names the first difference.
        """
        shapes = {name: list(place.shape) for name, place in self.storage.layout.places.items()}
        if shapes != state["shapes"]:
            name = next(name for name in [*shapes, *state["shapes"]] if shapes.get(name) != state["shapes"].get(name))
            raise ValueError(
                f"{name} has shape {shapes.get(name)} in the model and {state['shapes'].get(name)} in the snapshots"
            )
        saved = list(zip(state["steps"], state["slots"], strict=True))
        newest = saved[-self.capacity :]
        self.steps = [step for step, _ in newest]
        self._slots = list(range(len(newest)))
        for slot, (_, saved_slot) in enumerate(newest):
            self.storage.load_slot(slot, state["rows"], saved_slot)
        changes = []
        if len(newest) < len(saved):
            changes.append(f"the oldest {len(saved) - len(newest)} of {len(saved)} snapshots were dropped")
        dtypes = {str(row.dtype) for row in state["rows"]}, {str(row.dtype) for row in self.storage.state_dict()}
        if dtypes[0] != dtypes[1]:
            changes.append(f"snapshots in {', '.join(sorted(dtypes[0]))} are now in {', '.join(sorted(dtypes[1]))}")
        return changes


def refuse_if_too_large(required: Mapping[torch.device, int], num_snapshots: int, num_shadows: int = 0) -> None:
    """Checks that rings and shadows of these sizes fit into the memory that is free on each device.

    Raises:
        MemoryError: If one does not; the message says how much is needed, how much is there, and what to change.
    """
    for device, needed in required.items():
        free = free_bytes(device)
        if free is not None and needed > free:
            what = f"num_snapshots={num_snapshots} snapshots" + (f" and {num_shadows} averages" if num_shadows else "")
            raise MemoryError(
                f"{what} need {needed / 2**30:.2f} GiB on {device}, but only"
                f" {free / 2**30:.2f} GiB are free; keep fewer of them or keep them in dtype=torch.bfloat16"
            )


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated on a device; None where the platform does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu" and _MEMINFO.exists():
        # Free pages alone would leave out what the page cache gives back on demand.
        available = next(line for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024
    return None


def combine_(out: Tensor, rows: Sequence[Tensor], coefficients: Sequence[float]) -> None:
    """Writes ``sum_j coefficients[j] * rows[j]`` into ``out``; the kernel behind every merge.

    The sum is a chain of interpolations, ``m_j = m_(j-1) + (c_j / (c_1 + ... + c_j)) (x_j - m_(j-1))``: one operation a
    row, accumulated in float32 or better, and equal rows give exactly that row. Negative coefficients come last, which
    keeps the running total positive.

    Args:
        out: ``[num_elements]``, where the merge goes, of any floating dtype.
        rows: Tensors of the same shape, of any floating dtype.
        coefficients: Not zero, summing to one.
    """
    dtype = torch.promote_types(out.dtype, torch.float32)
    accumulator = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
    pairs = sorted(zip(coefficients, rows, strict=True), key=lambda pair: pair[0] < 0)
    total = 0.0
    for coefficient, row in pairs:
        if total == 0.0:
            accumulator.copy_(row)
        else:
            accumulator.lerp_(row.to(dtype), coefficient / (total + coefficient))
        total += coefficient
    if accumulator is not out:
        out.copy_(accumulator)
