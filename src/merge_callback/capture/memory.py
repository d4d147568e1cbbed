"""Bytes that snapshots take, and bytes that are free."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from merge_callback.capture.layout import RowLayout

_MEMINFO = Path("/proc/meminfo")


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
