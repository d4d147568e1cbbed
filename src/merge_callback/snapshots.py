"""The rolling buffer: snapshots as flat rows, and their merges.

A model's tensors lie one after the other in one flat row per dtype and device (`RowLayout`), so that capturing is one
copy and merging streams over long rows whatever the number of tensors. `SnapshotRing` keeps the order of the
snapshots; where the rows live is the business of a `SnapshotStorage`. Here that is the model's own device; pinned host
memory and a directory fit behind the same interface.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from merge_callback.combine import Row, chunks, combine_
from merge_callback.weights import size_bytes

# Tensors start at multiples of this many elements, so that kernels find them aligned as in the live model.
ALIGNMENT_NUMEL = 16
# Of the memory that is free, what may be taken for nothing but speed.
AMPLE_SHARE = 0.25
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

    def new_row(
        self, device: torch.device | None = None, dtype: torch.dtype | None = None, *, pin_memory: bool = False
    ) -> list[Tensor]:
        """An uninitialised row in a dtype and on a device, or in the live tensors' own."""
        return [
            torch.empty(numel, dtype=dtype or own_dtype, device=device or own_device, pin_memory=pin_memory)
            for (own_dtype, own_device), numel in zip(self.groups, self.num_elements, strict=True)
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
    def size_bytes(self) -> int:
        """Bytes of memory that it takes."""

    def write(self, slot: int, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies live tensors into a slot; until `finish` they may still be read."""

    def finish(self) -> None:
        """Called before anything writes to the live tensors."""

    def row(self, slot: int) -> Sequence[Row]:
        """The flat rows of a slot, one for each group of the layout."""

    @property
    def is_merged_in_host_memory(self) -> bool:
        """Whether `new_row` is there."""

    def new_row(self) -> list[Tensor]:
        """Room for a merge, in the memory where merges of these rows are made."""

    def problem(self, slot: int) -> str | None:
        """Why what was written into a slot cannot be used; None if it can."""

    def load(self, slot: int, step: int, row: Sequence[Row]) -> None:
        """Copies a saved row into a slot."""


def new_slots(
    layout: RowLayout,
    capacity: int,
    dtype: torch.dtype | None,
    device: torch.device | None = None,
    *,
    pin_memory: bool = False,
) -> list[list[Tensor]]:
    """So many rows, in a dtype and on a device or in the live tensors' own.

    Each has memory of its own, so that whoever saves some of them does not save all.
    """
    slots = [layout.new_row(device, dtype, pin_memory=pin_memory) for _ in range(capacity)]
    for part in itertools.chain.from_iterable(slots):
        # On purpose: the pages are touched now and not at the first capture, and no stale memory is ever saved.
        part.zero_()
    return slots


def slot_views(layout: RowLayout, slots: Iterable[Sequence[Tensor]]) -> list[list[Tensor]]:
    """For each slot the tensors inside its row, in the layout's order."""
    return [list(layout.views(row).values()) for row in slots]


class DeviceStorage:
    """Rows in the memory of the model's own device.

    Args:
        layout: Where each tensor lies in a row.
        capacity: Number of rows.
        dtype: Dtype in which snapshots are kept; None keeps each tensor's own.
    """

    def __init__(self, layout: RowLayout, capacity: int, dtype: torch.dtype | None = None) -> None:
        self.layout = layout
        self._slots = new_slots(layout, capacity, dtype)
        self._views = slot_views(layout, self._slots)

    def __getstate__(self) -> dict[str, Any]:
        """A copy's views are of its own rows: pickled by themselves they would not be."""
        return self.__dict__ | {"_views": []}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._views = slot_views(self.layout, self._slots)

    @property
    def size_bytes(self) -> int:
        """Bytes of all rows."""
        return size_bytes(itertools.chain.from_iterable(self._slots))

    @torch.no_grad()
    def write(self, slot: int, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies live tensors into a slot; each byte is read once and written once."""
        torch._foreach_copy_(self._views[slot], [tensors[name] for name in self.layout.places])

    def finish(self) -> None:
        """Copies are made in the order of the device's own work."""

    def row(self, slot: int) -> list[Tensor]:
        """The row of a slot itself, nothing is copied."""
        return self._slots[slot]

    @property
    def is_merged_in_host_memory(self) -> bool:
        """Whether the model is."""
        return all(device.type == "cpu" for _, device in self.layout.groups)

    def new_row(self) -> list[Tensor]:
        """Room for a merge, on the model's own device."""
        return self.layout.new_row()

    def problem(self, slot: int) -> str | None:
        """Memory does not spoil."""
        return None

    def load(self, slot: int, step: int, row: Sequence[Row]) -> None:
        """Copies a saved row into a slot."""
        for mine, saved in zip(self.row(slot), row, strict=True):
            mine.copy_(saved[:])


def required_bytes(
    layout: RowLayout, capacity: int, dtype: torch.dtype | None, device: torch.device | None = None
) -> dict[torch.device, int]:
    """Bytes that so many rows take, by device; all on one device if that is given, in host memory pinned for GPUs."""
    required: dict[torch.device, int] = {}
    for (own_dtype, own_device), numel in zip(layout.groups, layout.num_elements, strict=True):
        place = device or own_device
        size = numel * (dtype or own_dtype).itemsize
        if place.type == "cpu" and own_device.type == "cuda":
            size = _pinned_bytes(size)
        required[place] = required.get(place, 0) + capacity * size
    return required


def _pinned_bytes(size: int) -> int:
    """What torch takes for pinned memory of a size: the next power of two, unless it is told otherwise."""
    settings = [os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")]
    is_rounded = not any("pinned_max_round_threshold_mb" in setting for setting in settings)
    return 1 << (size - 1).bit_length() if is_rounded and size else size


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
        self._open: dict[int, str] = {}
        self._kept_rows: list[list[Tensor]] = []

    @property
    def is_full(self) -> bool:
        """Whether the next snapshot replaces the oldest one."""
        return len(self.steps) == self.capacity

    def append(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Stores the tensors as the snapshot of a step, in place of the oldest one where the ring is full."""
        self.storage.write(self._next_slot(step), step, tensors)

    def leave_open(self, step: int, problem: str) -> None:
        """Keeps the place of a snapshot that this process cannot take, until all ranks know of it; see `problems`."""
        self._next_slot(step)
        self._open[step] = problem

    def _next_slot(self, step: int) -> int:
        if self.is_full:
            self._keep(range(1, self.capacity))
        slot = min(set(range(self.capacity)) - set(self._slots))
        self.steps.append(step)
        self._slots.append(slot)
        return slot

    def thin(self) -> None:
        """Drops every second snapshot and keeps the oldest, so that half the ring covers what the whole one did."""
        self._keep(range(0, len(self.steps), 2))

    def clear(self) -> None:
        """Drops all snapshots."""
        self._keep(range(0))

    def _keep(self, positions: Sequence[int]) -> None:
        self.steps = [self.steps[position] for position in positions]
        self._slots = [self._slots[position] for position in positions]
        self._open = {step: problem for step, problem in self._open.items() if step in self.steps}

    def combine(self, coefficients: Sequence[float], out: list[Tensor] | None = None) -> list[Tensor]:
        """The merge ``sum_j c_j x_j`` as a row in the live tensors' dtypes, accumulated in float32 or better.

        Each snapshot with a coefficient is read once and the merge is written once; beside it only chunks are needed.

        Args:
            coefficients: One per snapshot, oldest first, summing to one.
            out: The row to write to; None is a new one.

        Returns:
            The row; `RowLayout.views` shows the tensors in it.
        """
        return self.combine_all([coefficients], [out or self.storage.new_row()])[0]

    def combine_all(
        self, coefficients: Sequence[Sequence[float]], outs: Sequence[list[Tensor]]
    ) -> Sequence[list[Tensor]]:
        """Several merges at once, for which each snapshot is read once all the same; see `combine_`.

        Args:
            coefficients: Those of each merge.
            outs: As many rows to write to.

        Returns:
            The rows.
        """
        used = [any(of_snapshot) for of_snapshot in zip(*coefficients, strict=True)]
        coefficients = [list(itertools.compress(each, used)) for each in coefficients]
        for out, rows in zip(zip(*outs, strict=True), self._rows(used), strict=True):
            combine_(out, rows, coefficients)
        return outs

    def merges(self, coefficients: Sequence[Sequence[float]]) -> Iterator[list[Tensor]]:
        """`combine` for each; a row and views of it are good until the next one is asked for, also in a later call.

        In host memory the rows are kept and written to again, since touching fresh memory takes as long as merging, and
        all merges are made at once where there is ample memory for them. On a GPU there is one at a time.
        """
        outs = self._kept(len(coefficients)) if self.storage.is_merged_in_host_memory else []
        if len(outs) == len(coefficients):
            yield from self.combine_all(coefficients, outs)
        else:
            for each in coefficients:
                yield self.combine(each, *outs)

    def _kept(self, num_rows: int) -> list[list[Tensor]]:
        """As many rows, or a single one where memory is short."""
        num_new = num_rows - len(self._kept_rows)
        free = free_bytes(torch.device("cpu"))
        required = sum(required_bytes(self.storage.layout, num_new, None).values())
        if num_new > 0 and free is not None and required > AMPLE_SHARE * free:
            num_rows = 1
        self._kept_rows += [self.storage.new_row() for _ in range(num_rows - len(self._kept_rows))]
        return self._kept_rows[:num_rows]

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
        rows_of = self._rows([value != 0 for value in coefficients])
        for group, start, stop, shared_by in self.storage.layout.runs(copies or {}):
            rows, center = rows_of[group], merged[group]
            found = torch.zeros(2, dtype=torch.float64, device=center.device)
            for chunk in chunks(start, stop, center.device):
                middle = center[chunk].to(torch.promote_types(center.dtype, torch.float32))
                difference = torch.empty_like(middle)
                for row in rows:
                    torch.sub(row[chunk].to(middle), middle, out=difference)
                    found[0] += torch.dot(difference, difference) / len(rows)
                found[1] += torch.dot(middle, middle)
            sums += found.cpu() / shared_by
        distance, norm = add_up(sums).tolist()
        return math.sqrt(distance / norm) if norm else 0.0

    def _rows(self, is_used: Sequence[bool]) -> list[list[Row]]:
        """For each group of the layout the rows that are used."""
        slots = [slot for slot, is_one in zip(self._slots, is_used, strict=True) if is_one]
        rows = [self.storage.row(slot) for slot in slots]
        return [list(of_group) for of_group in zip(*rows, strict=True)]

    def problems(self) -> dict[int, str]:
        """Steps whose snapshots cannot be used, and why."""
        found = {
            step: self._open.get(step) or self.storage.problem(slot)
            for step, slot in zip(self.steps, self._slots, strict=True)
        }
        return {step: problem for step, problem in found.items() if problem is not None}

    def drop(self, steps: Iterable[int]) -> None:
        """Drops the snapshots of some steps."""
        dropped = set(steps)
        self._keep([position for position, step in enumerate(self.steps) if step not in dropped])

    def state_dict(self) -> dict[str, Any]:
        """Rows by reference, oldest first, and of which steps they are."""
        return self.order() | {"rows": [[row[:] for row in self.storage.row(slot)] for slot in self._slots]}

    def order(self) -> dict[str, Any]:
        """What `state_dict` has beside the rows."""
        shapes = {name: list(place.shape) for name, place in self.storage.layout.places.items()}
        return {"steps": list(self.steps), "shapes": shapes}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Takes over the newest snapshots of a saved ring, as many as fit.

        Returns:
            What was dropped or changed on the way, in words.

        Raises:
            ValueError: If the saved snapshots are of other tensors; the message names the first difference.
        """
        shapes = self.order()["shapes"]
        if shapes != state["shapes"]:
            name = next(name for name in [*shapes, *state["shapes"]] if shapes.get(name) != state["shapes"].get(name))
            raise ValueError(
                f"{name} has shape {shapes.get(name)} in the model and {state['shapes'].get(name)} in the snapshots"
            )
        changes = self.load(state["steps"], state["rows"])
        if self._slots:
            saved, mine = (
                {str(row[:0].dtype) for row in rows} for rows in (state["rows"][-1], self.storage.row(self._slots[-1]))
            )
            if saved != mine:
                changes.append(f"snapshots in {', '.join(sorted(saved))} are now in {', '.join(sorted(mine))}")
        return changes

    def load(self, steps: Sequence[int], rows: Iterable[Sequence[Row]]) -> list[str]:
        """Takes over the newest snapshots, as many as fit; returns what was dropped, in words."""
        num_dropped = max(0, len(steps) - self.capacity)
        self.steps = list(steps[num_dropped:])
        self._slots = list(range(len(self.steps)))
        for slot, row in enumerate(itertools.islice(rows, num_dropped, None)):
            self.storage.load(slot, self.steps[slot], row)
        return [f"the oldest {num_dropped} of {len(steps)} snapshots were dropped"] if num_dropped else []


def refuse_if_too_large(
    required: Mapping[torch.device, int], num_snapshots: int, num_shadows: int = 0, num_processes: int = 1
) -> None:
    """Checks that rings and shadows of these sizes fit into the memory that is free on each device.

    Args:
        required: Bytes that this process needs, by device, a merge included.
        num_snapshots: In the ring.
        num_shadows: Averages.
        num_processes: How many on this host need as much of its memory.

    Raises:
        MemoryError: If one does not; the message says how much is needed, how much is there, and what to change.
    """
    for device, size in required.items():
        free = free_bytes(device)
        is_shared = device.type == "cpu" and num_processes > 1
        needed = size * num_processes if is_shared else size
        if free is not None and needed > free:
            of_all = f" for {num_processes} processes" if is_shared else ""
            averages = f", {num_shadows} averages" if num_shadows else ""
            what = f"num_snapshots={num_snapshots} snapshots{averages} and a merge of them{of_all}"
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
