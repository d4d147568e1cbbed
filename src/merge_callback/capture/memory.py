"""Computes how much memory a capture takes, and how much is free."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from merge_callback.capture.layout import RowLayout
from merge_callback.utilities.devices import free_bytes, works_beside_host


@dataclass(frozen=True)
class CaptureSizes:
    """Bytes of memory that a capture takes: snapshots, averages, and the copy of the weights that averages read."""

    snapshots: int = 0
    averages: int = 0
    copy: int = 0


def required_bytes(
    layout: RowLayout, capacity: int, dtype: torch.dtype | None, device: torch.device | None = None
) -> dict[torch.device, int]:
    """Returns the bytes that ``capacity`` rows take, by device; all on ``device`` if it is given.

    Rows in host memory of a model on a GPU count as pinned memory.
    """
    required: dict[torch.device, int] = {}
    for (own_dtype, own_device), numel in zip(layout.groups, layout.num_elements, strict=True):
        place = device or own_device
        size = numel * (dtype or own_dtype).itemsize
        if place.type == "cpu" and works_beside_host(own_device):
            size = _pinned_bytes(size)
        required[place] = required.get(place, 0) + capacity * size
    return required


def _pinned_bytes(size: int) -> int:
    """Returns the bytes that torch allocates for pinned memory: the next power of two, unless configured otherwise."""
    settings = [os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")]
    is_rounded = not any("pinned_max_round_threshold_mb" in setting for setting in settings)
    return 1 << (size - 1).bit_length() if is_rounded and size else size


def refuse_if_too_large(
    required: Mapping[torch.device, int], num_snapshots: int, num_averages: int = 0, num_processes: int = 1
) -> None:
    """Raises MemoryError unless snapshots and averages fit into the free memory of each device.

    Args:
        required: Bytes that this process needs by device, including those of one merge.
        num_snapshots: Capacity of the ring.
        num_averages: Number of averages over every step.
        num_processes: Processes on this host that allocate as much as this one.

    Raises:
        MemoryError: If they do not fit. The message says how much is needed, how much is free, and what to change.
    """
    for device, size in required.items():
        free = free_bytes(device)
        is_shared = device.type == "cpu" and num_processes > 1
        needed = size * num_processes if is_shared else size
        if free is not None and needed > free:
            of_all = f" for {num_processes} processes" if is_shared else ""
            averages = f", {num_averages} averages" if num_averages else ""
            what = f"num_snapshots={num_snapshots} snapshots{averages} and a merge of them{of_all}"
            raise MemoryError(
                f"{what} need {needed / 2**30:.2f} GiB on {device}, but only"
                f" {free / 2**30:.2f} GiB are free; keep fewer of them or keep them in dtype=torch.bfloat16"
            )


def on_devices(layout: RowLayout) -> str:
    """Returns the devices of the live tensors, in words for the user."""
    return f"on {', '.join(sorted({str(device) for _, device in layout.groups}))}"


def mebibytes(num_bytes: int) -> str:
    """Returns a number of bytes in MiB, as text.

    Examples:
        >>> mebibytes(3 * 2**19)
        '1.5 MiB'
    """
    return f"{num_bytes / 2**20:.1f} MiB"
