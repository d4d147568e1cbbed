"""What differs between devices: whether they work beside the host, and how much memory they have left."""

import time
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")


def works_beside_host(device: torch.device) -> bool:
    """Returns whether work on the device is queued, so that copies to pinned host memory run beside the training.

    True for the accelerator of this process (CUDA, ROCm, XPU and others that torch knows), except for MPS, whose memory
    is the host's and whose copies are made at once, as on a CPU.
    """
    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and device.type == accelerator.type and device.type != "mps"


def wait_for_device(device: torch.device) -> float:
    """Waits until a device has done all queued work, and returns the seconds waited. On a CPU it returns at once."""
    began = time.perf_counter()
    if works_beside_host(device):
        torch.accelerator.synchronize(device)
    return time.perf_counter() - began


def free_bytes(device: torch.device) -> int | None:
    """Returns the bytes that can still be allocated on a device; None if the platform does not report it."""
    if device.type == "cpu" and _MEMINFO.exists():
        # Not MemFree, which leaves out the memory that the page cache returns on demand.
        available = next(line for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024
    if not works_beside_host(device):
        return None
    module = torch.get_device_module(device)
    if not all(hasattr(module, name) for name in ("mem_get_info", "memory_reserved", "memory_allocated")):
        return None
    free, _ = module.mem_get_info(device)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))
