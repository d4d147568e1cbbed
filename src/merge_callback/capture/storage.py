"""Where snapshots live: the places that a user can choose, and the storage of rows in memory."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from merge_callback.capture.layout import RowLayout
from merge_callback.live.weights import size_bytes
from merge_callback.merging.combine import Row

HOST = torch.device("cpu")


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


def new_slots(
    layout: RowLayout,
    capacity: int,
    dtype: torch.dtype | None,
    device: torch.device | None = None,
    *,
    pin_memory: bool = False,
) -> list[list[Tensor]]:
    """Rows of zeros, in a dtype and on a device, or in the live tensors' own.

    Each row has memory of its own, so that saving some of them does not save all.
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


class HostStorage:
    """Rows in host memory, pinned where there is a GPU; copied on a stream of their own beside the forward pass.

    Args:
        layout: Where each tensor lies in a row.
        capacity: Number of rows.
        dtype: Dtype in which snapshots are kept; None keeps each tensor's own.
    """

    is_merged_in_host_memory = True

    def __init__(self, layout: RowLayout, capacity: int, dtype: torch.dtype | None = None) -> None:
        self.layout = layout
        self._gpus = sorted({device for _, device in layout.groups if device.type == "cuda"}, key=str)
        self._slots = new_slots(layout, capacity, dtype, HOST, pin_memory=bool(self._gpus))
        self._prepare()

    def _prepare(self) -> None:
        self._views = slot_views(self.layout, self._slots)
        self._streams = {gpu: torch.cuda.Stream(gpu) for gpu in self._gpus}
        self._copied: dict[torch.device, torch.cuda.Event] = {}
        self._is_waited_for = True

    def __getstate__(self) -> dict[str, Any]:
        """A copy's views are of its own rows, and its streams its own."""
        self.arrive()
        return {"layout": self.layout, "_gpus": self._gpus, "_slots": self._slots}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        if self._gpus:
            self._slots = [[part.pin_memory() for part in row] for row in self._slots]
        self._prepare()

    @property
    def size_bytes(self) -> int:
        """Bytes of all rows."""
        return size_bytes(chain.from_iterable(self._slots))

    def write(self, slot: int, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies live tensors into a slot; with a GPU the copy is under way when this returns."""
        sources = [tensors[name].detach() for name in self.layout.places]
        with ExitStack() as streams:
            for gpu, stream in self._streams.items():
                stream.wait_stream(torch.cuda.current_stream(gpu))
                streams.enter_context(torch.cuda.stream(stream))
            for view, source in zip(self._views[slot], sources, strict=True):
                if source.is_cuda:
                    # Cast there: otherwise torch copies what is not contiguous by way of memory that is not pinned.
                    view.copy_(source.to(view.dtype), non_blocking=True)
                else:
                    # Only of a GPU's copies is it known when they have arrived.
                    view.copy_(source)
        # Whoever waits for one need not keep a core busy meanwhile.
        self._copied = {
            gpu: stream.record_event(torch.cuda.Event(blocking=True)) for gpu, stream in self._streams.items()
        }
        self._is_waited_for = False

    def finish(self) -> None:
        """What the GPU does from now on waits for copies under way; the host does not."""
        if not self._is_waited_for:
            for gpu, event in self._copied.items():
                torch.cuda.current_stream(gpu).wait_event(event)
        self._is_waited_for = True

    def arrive(self) -> None:
        """Returns when what was written is there."""
        for gpu, event in self._copied.items():
            with torch.cuda.device(gpu):
                event.synchronize()

    def row(self, slot: int) -> list[Tensor]:
        """The row of a slot, when it has arrived."""
        self.arrive()
        return self._slots[slot]

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """The tensors of a slot by name, when they have arrived; views."""
        self.arrive()
        return dict(zip(self.layout.places, self._views[slot], strict=True))

    def new_row(self) -> list[Tensor]:
        """Room for a merge in host memory: a GPU's need not hold model, live weights and merge at once."""
        return host_row(self.layout)

    def problem(self, slot: int) -> str | None:
        """Memory does not spoil."""
        return None


def host_row(layout: RowLayout) -> list[Tensor]:
    """An uninitialised row in host memory, pinned if its tensors come from a GPU."""
    return layout.new_row(HOST, pin_memory=any(device.type == "cuda" for _, device in layout.groups))
