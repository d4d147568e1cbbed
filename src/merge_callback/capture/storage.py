"""Storage for snapshot rows: the interface, and its implementations in device memory and in host memory."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from merge_callback.capture.layout import RowLayout
from merge_callback.live.weights import size_bytes
from merge_callback.merging.combine import Row, combine_
from merge_callback.utilities.devices import works_beside_host

HOST = torch.device("cpu")


class SnapshotStorage(Protocol):
    """Interface of a storage for snapshot rows. Slots are numbered from zero up to the ring's capacity."""

    layout: RowLayout

    @property
    def size_bytes(self) -> int:
        """Bytes of memory that the storage takes."""

    def write(self, slot: int, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies live tensors into a slot. The copy may still read them until `finish` is called."""

    def average(self, slot: int, other: int, step: int, share: float) -> None:
        """Replaces the row of a slot, which becomes that of a step, by its mean with the row of another slot.

        Args:
            slot: The slot whose row is replaced.
            other: The other slot.
            step: The step of the new row.
            share: The other row's weight in the mean.
        """

    def finish(self) -> None:
        """Makes it safe to write to the live tensors; call it before any write."""

    def row(self, slot: int) -> Sequence[Row]:
        """Returns the row of a slot: one flat tensor for each group of the layout."""

    @property
    def is_merged_in_host_memory(self) -> bool:
        """Whether merges of these rows are made in host memory."""

    def new_row(self) -> list[Tensor]:
        """Allocates a row for a merge, in the memory where merges of these rows are made."""

    def problem(self, slot: int) -> str | None:
        """Returns why the snapshot in a slot cannot be used; None if it can."""


def new_slots(
    layout: RowLayout,
    capacity: int,
    dtype: torch.dtype | None,
    device: torch.device | None = None,
    *,
    pin_memory: bool = False,
) -> list[list[Tensor]]:
    """Allocates ``capacity`` rows of zeros. Each has its own memory, so that saving some rows does not save all.

    Args:
        layout: Where each tensor lies in a row.
        capacity: Number of rows.
        dtype: Dtype of the rows; None keeps each live tensor's own.
        device: Device of the rows; None keeps each live tensor's own.
        pin_memory: Whether rows in host memory are pinned.
    """
    slots = [layout.new_row(device, dtype, pin_memory=pin_memory) for _ in range(capacity)]
    for part in itertools.chain.from_iterable(slots):
        # Touches the pages now rather than at the first capture, and keeps stale memory out of checkpoints.
        part.zero_()
    return slots


def slot_views(layout: RowLayout, slots: Iterable[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Returns, for each slot, views of the tensors inside its row, in the layout's order."""
    return [list(layout.views(row).values()) for row in slots]


class DeviceStorage:
    """Stores rows in the memory of the model's own device.

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
        """Leaves out the views: `__setstate__` makes new ones, which point into the copy's own rows."""
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

    def average(self, slot: int, other: int, step: int, share: float) -> None:
        """Replaces the row of a slot by its mean with the row of another slot, in place."""
        average_(self.row(slot), [self.row(slot), self.row(other)], share)

    def finish(self) -> None:
        """Does nothing: the device makes copies in order with its other work."""

    def row(self, slot: int) -> list[Tensor]:
        """Returns the row of a slot itself, not a copy."""
        return self._slots[slot]

    @property
    def is_merged_in_host_memory(self) -> bool:
        """Whether the model is in host memory, since merges are made on the model's device."""
        return all(device.type == "cpu" for _, device in self.layout.groups)

    def new_row(self) -> list[Tensor]:
        """Allocates a row for a merge on the model's own device."""
        return self.layout.new_row()

    def problem(self, slot: int) -> str | None:
        """Returns None: rows in memory can always be used."""
        return None


class HostStorage:
    """Stores rows in host memory. For an accelerator's model it is pinned, and copies run beside the forward pass.

    Args:
        layout: Where each tensor lies in a row.
        capacity: Number of rows.
        dtype: Dtype in which snapshots are kept; None keeps each tensor's own.
    """

    is_merged_in_host_memory = True

    def __init__(self, layout: RowLayout, capacity: int, dtype: torch.dtype | None = None) -> None:
        self.layout = layout
        self._accelerators = sorted({place for _, place in layout.groups if works_beside_host(place)}, key=str)
        self._slots = new_slots(layout, capacity, dtype, HOST, pin_memory=bool(self._accelerators))
        self._prepare()

    def _prepare(self) -> None:
        self._views = slot_views(self.layout, self._slots)
        self._streams = {device: torch.Stream(device) for device in self._accelerators}
        self._copied: dict[torch.device, torch.Event] = {}
        self._is_waited_for = True

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out views and streams, of which a copy makes its own. Waits for copies under way first."""
        self.arrive()
        return {"layout": self.layout, "_accelerators": self._accelerators, "_slots": self._slots}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        if self._accelerators:
            # Tensors that were pickled or copied are not pinned.
            self._slots = [[part.pin_memory() for part in row] for row in self._slots]
        self._prepare()

    @property
    def size_bytes(self) -> int:
        """Bytes of all rows."""
        return size_bytes(chain.from_iterable(self._slots))

    def write(self, slot: int, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies live tensors into a slot. Copies from an accelerator are still under way when this returns."""
        sources = [tensors[name].detach() for name in self.layout.places]
        with ExitStack() as streams:
            for device, stream in self._streams.items():
                stream.wait_stream(torch.accelerator.current_stream(device))
                streams.enter_context(stream)
            for view, source in zip(self._views[slot], sources, strict=True):
                if source.device in self._streams:
                    # Cast on the device: otherwise torch copies strided tensors through memory that is not pinned.
                    view.copy_(source.to(view.dtype), non_blocking=True)
                else:
                    # Synchronous: only a copy from an accelerator has an event that tells when it has arrived.
                    view.copy_(source)
        # Blocking events, so that a thread that waits for one does not keep a core busy.
        self._copied = {
            device: stream.record_event(torch.Event(device, blocking=True)) for device, stream in self._streams.items()
        }
        self._is_waited_for = False

    def average(self, slot: int, other: int, step: int, share: float) -> None:
        """Replaces the row of a slot by its mean with the row of another slot, in place."""
        average_(self.row(slot), [self.row(slot), self.row(other)], share)

    def finish(self) -> None:
        """Makes the device's later work wait for copies under way; the host does not wait."""
        if not self._is_waited_for:
            for device, event in self._copied.items():
                torch.accelerator.current_stream(device).wait_event(event)
        self._is_waited_for = True

    def arrive(self) -> None:
        """Waits until all copies have arrived in host memory."""
        for event in self._copied.values():
            event.synchronize()

    def row(self, slot: int) -> list[Tensor]:
        """Returns the row of a slot, after its copy has arrived."""
        self.arrive()
        return self._slots[slot]

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """Returns views of the tensors of a slot by name, after their copy has arrived."""
        self.arrive()
        return dict(zip(self.layout.places, self._views[slot], strict=True))

    def new_row(self) -> list[Tensor]:
        """Allocates a row for a merge in host memory, so that it takes no GPU memory beside model and live weights."""
        return host_row(self.layout)

    def problem(self, slot: int) -> str | None:
        """Returns None: rows in memory can always be used."""
        return None


def average_(out: Sequence[Tensor], rows: Sequence[Sequence[Row]], share: float) -> None:
    """Writes the mean of two rows, of which the second has this share, into a row; it may be one of the two."""
    for target, *pair in zip(out, *rows, strict=True):
        combine_([target], pair, [[1 - share, share]])


def host_row(layout: RowLayout) -> list[Tensor]:
    """Allocates an uninitialised row in host memory, pinned if a live tensor is on an accelerator."""
    return layout.new_row(HOST, pin_memory=any(works_beside_host(device) for _, device in layout.groups))
