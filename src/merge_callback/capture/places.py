"""Places where a user can keep snapshots: the interface of a place, and memory as one."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from merge_callback.capture.layout import RowLayout
from merge_callback.capture.memory import CaptureSizes, mebibytes, on_devices
from merge_callback.capture.storage import HOST, DeviceStorage, HostStorage, SnapshotStorage
from merge_callback.utilities.checks import check_bool


class StoragePlace(Protocol):
    """Interface of a place for snapshots. It creates the storage once the model is known."""

    @property
    def in_checkpoints(self) -> bool:
        """Whether checkpoints hold the snapshots and averages."""

    @property
    def merge_device(self) -> torch.device | None:
        """Device where snapshots are in memory and merges are made; None is the model's own."""

    @property
    def average_device(self) -> torch.device | None:
        """Device where averages over every step are kept; None is the model's own."""

    @property
    def is_shared_by_ranks(self) -> bool:
        """Whether something outside the process may spoil a snapshot, so that ranks must agree on which are usable."""

    @property
    def is_strict(self) -> bool:
        """Whether a snapshot that cannot be used is an error."""

    def num_rows_in_memory(self, num_snapshots: int) -> int:
        """Returns how many rows ``num_snapshots`` snapshots take in memory."""

    def new_storage(
        self, layout: RowLayout, num_snapshots: int, dtype: torch.dtype | None, name: str
    ) -> SnapshotStorage:
        """Creates the storage on this rank for the callback with this name."""

    def describe(self, layout: RowLayout, num_snapshots: int, dtype: torch.dtype | None, sizes: CaptureSizes) -> str:
        """Returns where snapshots and averages are and how many bytes they take, in words for the user."""


@dataclass(frozen=True)
class SnapshotMemory:
    """Keeps snapshots in memory: on the model's device or in host memory.

    Args:
        place: ``"device"`` is the memory of the model's device. ``"cpu"`` is host memory; with a GPU it is pinned and
            filled while training goes on. Averages over every step are kept in the same place.
        in_checkpoints: Whether checkpoints hold the snapshots, the averages and the inputs that are kept for batch norm
            statistics. If not, the window starts empty after a resume.

    Raises:
        ValueError: If ``place`` is neither ``"device"`` nor ``"cpu"``.

    Examples:
        >>> SnapshotMemory("cpu", in_checkpoints=False)
        SnapshotMemory(place='cpu', in_checkpoints=False)
    """

    place: Literal["device", "cpu"] = "device"
    in_checkpoints: bool = True

    def __post_init__(self) -> None:
        if self.place not in ("device", "cpu"):
            raise ValueError(f"place must be 'device' or 'cpu', got {self.place!r}")
        check_bool("in_checkpoints", self.in_checkpoints)

    @property
    def merge_device(self) -> torch.device | None:
        return None if self.place == "device" else HOST

    average_device = merge_device
    is_shared_by_ranks = False
    is_strict = False

    def num_rows_in_memory(self, num_snapshots: int) -> int:
        return num_snapshots

    def new_storage(
        self, layout: RowLayout, num_snapshots: int, dtype: torch.dtype | None, name: str
    ) -> SnapshotStorage:
        storage = DeviceStorage if self.place == "device" else HostStorage
        return storage(layout, num_snapshots, dtype)

    def describe(self, layout: RowLayout, num_snapshots: int, dtype: torch.dtype | None, sizes: CaptureSizes) -> str:
        where = on_devices(layout) if self.place == "device" else "of host memory"
        return f"in {mebibytes(sizes.snapshots + sizes.averages + sizes.copy)} {where}"


DEVICE_MEMORY = SnapshotMemory()
