"""Computes and describes what a capture takes: memory by device, and bytes in checkpoints."""

from dataclasses import dataclass

import torch

from merge_callback.capture.kinds import PointSnapshots
from merge_callback.capture.layout import RowLayout
from merge_callback.capture.memory import CaptureSizes, required_bytes
from merge_callback.capture.moving import shadow_bytes
from merge_callback.capture.places import StoragePlace
from merge_callback.capture.running_averages import RunningAverages
from merge_callback.capture.storage import HOST


@dataclass(frozen=True)
class CaptureCosts:
    """What a capture takes for tensors of one layout.

    Args:
        layout: Layout of the live tensors.
        num_snapshots: Capacity of the ring.
        dtype: Dtype in which snapshots are kept; None keeps each tensor's own.
        kind: What a snapshot keeps.
        averages: The averages over every step.
        storage: Where snapshots and averages are kept.
    """

    layout: RowLayout
    num_snapshots: int
    dtype: torch.dtype | None
    kind: PointSnapshots
    averages: RunningAverages
    storage: StoragePlace

    def required_bytes(self) -> dict[torch.device, int]:
        """Returns the bytes by device of snapshots, one merge of them, averages and the copies that averages read."""
        place = self.storage.merge_device
        num_rows = self.storage.num_rows_in_memory(self.num_snapshots)
        needs = [
            required_bytes(self.layout, num_rows, self.dtype, place),
            required_bytes(self.layout, 1, None, place),
            *[shadow_bytes(self.layout, self.averages.device)] * len(self.averages),
            self._mean_bytes(),
        ]
        if len(self.averages) and self.averages.device is not None:
            needs.append({HOST: sum(required_bytes(self.layout, 1, None).values())})
        return {device: sum(need.get(device, 0) for need in needs) for need in needs for device in need}

    def describe(self) -> str:
        """Returns where snapshots and averages are and how many bytes they take, in words for the user."""
        averages = len(self.averages) * sum(shadow_bytes(self.layout).values()) + sum(self._mean_bytes().values())
        num_rows = self.storage.num_rows_in_memory(self.num_snapshots)
        rows = sum(required_bytes(self.layout, num_rows, self.dtype).values())
        sizes = CaptureSizes(snapshots=rows, averages=averages, copy=self.averages.copy_bytes)
        return self.storage.describe(self.layout, self.num_snapshots, self.dtype, sizes)

    @property
    def ring_bytes(self) -> int:
        """Bytes of a full ring, in memory or in files."""
        return sum(required_bytes(self.layout, self.num_snapshots, self.dtype).values())

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes that a checkpoint of this process holds of a full ring, the interval in progress and averages."""
        num_wide = len(self.averages) + bool(self.num_snapshots and self.kind.required_bytes(self.layout))
        return self.ring_bytes + num_wide * sum(shadow_bytes(self.layout).values())

    def _mean_bytes(self) -> dict[torch.device, int]:
        return self.kind.required_bytes(self.layout) if self.num_snapshots else {}
