"""The places where a user can keep snapshots; each makes the storage for them."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from merge_callback.capture.layout import RowLayout
from merge_callback.capture.memory import CaptureSizes, mebibytes, on_devices
from merge_callback.capture.storage import HOST, DeviceStorage, HostStorage, SnapshotStorage
from merge_callback.utilities.checks import check_bool


class StoragePlace(Protocol):
    """Where a user wants snapshots to be kept; makes the storage once the model is known."""

    @property
    def in_checkpoints(self) -> bool:
        """Whether checkpoints hold what is kept."""

    @property
    def merge_device(self) -> torch.device | None:
        """Where snapshots are in memory and merges are made; None is where the model is."""

    @property
    def average_device(self) -> torch.device | None:
        """Where averages over every step are kept; None is where the model is."""

    @property
    def is_shared_by_ranks(self) -> bool:
        """Whether something outside the process may spoil a snapshot, so that ranks have to agree on what is usable."""

    @property
    def is_strict(self) -> bool:
        """Whether a snapshot that cannot be used is an error."""

    def num_rows_in_memory(self, num_snapshots: int) -> int:
        """Rows of this many snapshots that take memory."""

    def new_storage(
        self, layout: RowLayout, num_snapshots: int, dtype: torch.dtype | None, name: str
    ) -> SnapshotStorage:
        """The storage of a callback of that name on this rank."""

    def describe(self, layout: RowLayout, num_snapshots: int, dtype: torch.dtype | None, sizes: CaptureSizes) -> str:
        """Where snapshots and averages are, and how many bytes they take, in words."""


@dataclass(frozen=True)
class SnapshotMemory:
    """Memory as the place of snapshots.

    Args:
        place: ``"device"``, where the model is, or ``"cpu"``, host memory: pinned and filled beside the training where
            there is a GPU. Averages over every step are kept there too.
        in_checkpoints: Whether checkpoints hold the snapshots, the averages and the inputs that are kept for batch norm
            statistics. Without them a resumed window starts empty.

    Raises:
        ValueError: If there is no such place.

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
