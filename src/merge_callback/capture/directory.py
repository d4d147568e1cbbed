"""Keeps snapshots in a directory, as one file with a checksum each."""

import json
import os
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch
from torch import Tensor

from merge_callback.capture.layout import RowLayout
from merge_callback.capture.memory import CaptureSizes, mebibytes, on_devices, required_bytes
from merge_callback.capture.storage import HOST, HostStorage, average_, host_row
from merge_callback.live.sharding import rank
from merge_callback.merging.combine import CHUNK_NUMEL, Row
from merge_callback.utilities.background import Background
from merge_callback.utilities.checks import check_bool
from merge_callback.utilities.files import FlatTensor, atomic_write, read_header, write_safetensors


@dataclass(frozen=True)
class SnapshotDirectory:
    """Keeps snapshots in a directory: one file per snapshot and rank, at most ``num_snapshots`` per rank.

    Args:
        path: The directory; missing folders are created.
        strict: Whether a missing or corrupt file is an error when a merge is made. If False, a warning names the
            snapshot, and the merge is made from the others.
        in_checkpoints: Whether checkpoints hold the snapshots too; see `SnapshotMemory`.
    """

    path: str | os.PathLike[str]
    strict: bool = False
    in_checkpoints: bool = True

    def __post_init__(self) -> None:
        check_bool("strict", self.strict)
        check_bool("in_checkpoints", self.in_checkpoints)

    @property
    def merge_device(self) -> torch.device | None:
        return HOST

    average_device = None
    is_shared_by_ranks = True

    @property
    def is_strict(self) -> bool:
        return self.strict

    def num_rows_in_memory(self, num_snapshots: int) -> int:
        # Only the row that is being written to the disk.
        return min(num_snapshots, 1)

    def new_storage(
        self, layout: RowLayout, num_snapshots: int, dtype: torch.dtype | None, name: str
    ) -> "DirectoryStorage":
        return DirectoryStorage(layout, dtype, Path(self.path), f"{quote(name, safe='')}-rank{rank():05d}-")

    def describe(self, layout: RowLayout, num_snapshots: int, dtype: torch.dtype | None, sizes: CaptureSizes) -> str:
        averages = f"{mebibytes(sizes.averages)} {on_devices(layout)}"
        if not num_snapshots:
            return f"in {averages}"
        in_files = mebibytes(sum(required_bytes(layout, num_snapshots, dtype).values()))
        beside = f" and {averages}" if sizes.averages else ""
        in_memory = f"with {mebibytes(sizes.snapshots)} of host memory{beside}"
        return f"in files in {self.path}, up to {in_files} by each rank, {in_memory}"


class DirectoryStorage:
    """Stores rows as files in a directory.

    A background thread writes each file atomically, and each file is checked before a merge uses it. A `HostStorage`
    holds the one row that is being written to the disk.

    Args:
        layout: Where each tensor lies in a row.
        dtype: Dtype in which snapshots are kept; None keeps each tensor's own.
        folder: Folder of the files.
        prefix: Start of the file names; differs for each callback and rank.
    """

    is_merged_in_host_memory = True

    def __init__(self, layout: RowLayout, dtype: torch.dtype | None, folder: Path, prefix: str) -> None:
        self.layout = layout
        self.folder = folder
        self.prefix = prefix
        # Marks the files of this run: another run may write files of the same names.
        self._owner = uuid.uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)
        # Holds the one snapshot that is being written to the disk; the next one waits until that is done.
        self._staged = HostStorage(layout, 1, dtype)
        self._background = Background("snapshots")
        # By slot: what its file should say of itself, why its latest write failed, and modification time and size of
        # the file at the latest check.
        self._written: dict[int, str] = {}
        self._failed: dict[int, str] = {}
        self._checked: dict[int, tuple[int, int]] = {}

    @property
    def size_bytes(self) -> int:
        """Bytes of memory, which are those of the one row that is being written."""
        return self._staged.size_bytes

    def path(self, slot: int) -> Path:
        """Returns the path of a slot's file."""
        return self.folder / f"{self.prefix}{slot:03d}.safetensors"

    def write(self, slot: int, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies live tensors as `HostStorage.write` does. A background thread then writes the file."""
        self._background.wait()
        self._staged.write(0, step, tensors)
        self._background.begin(self._write_file, slot, step)

    def average(self, slot: int, other: int, step: int, share: float) -> None:
        """Calculates the mean of two rows in memory. A background thread then writes its file."""
        self._background.wait()
        average_(self._staged.row(0), [self.row(slot), self.row(other)], share)
        self._background.begin(self._write_file, slot, step)

    def finish(self) -> None:
        """Makes later GPU work wait for the copy under way."""
        self._staged.finish()

    def row(self, slot: int) -> list[Row]:
        """Returns the row of a slot; only the slices that a caller takes are read from the file."""
        self._background.wait()
        return [FlatTensor(self.path(slot), f"row{group}") for group in range(len(self.layout.groups))]

    def new_row(self) -> list[Tensor]:
        """Allocates a row for a merge in host memory."""
        return host_row(self.layout)

    def problem(self, slot: int) -> str | None:
        """Returns why the snapshot in a slot cannot be used; None if it can. To check a file, reads it through once."""
        self._background.wait()
        if slot in self._failed:
            return self._failed[slot]
        path = self.path(slot)
        try:
            state = path.stat().st_mtime_ns, path.stat().st_size
            if self._checked.get(slot) == state:
                return None
            found = read_header(path)[0]
            if found.get("__metadata__") != {"snapshot": self._written[slot]}:
                return f"{path} was written by another run; use another directory or another callback name for each run"
            sums = [_checksum(row) for row in self.row(slot)]
        except (OSError, KeyError, ValueError) as error:
            return f"{path} cannot be read: {error}"
        if sums != json.loads(self._written[slot])["checksums"]:
            return f"{path} is corrupt: its checksum is not the one that was written"
        self._checked[slot] = state
        return None

    def _write_file(self, slot: int, step: int) -> None:
        self._checked.pop(slot, None)
        self._failed.pop(slot, None)
        rows = {f"row{group}": row for group, row in enumerate(self._staged.row(0))}
        told = {"owner": self._owner, "step": step, "checksums": [_checksum(row) for row in rows.values()]}
        self._written[slot] = json.dumps(told)
        path = self.path(slot)
        try:
            # Somebody may have removed the folder since.
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as unfinished:
                write_safetensors(unfinished, rows, rows.values(), {"snapshot": self._written[slot]})
        except OSError as error:
            self._failed[slot] = f"{path} could not be written: {error}"


def _checksum(row: Row) -> int:
    found, start = 0, 0
    while (chunk := row[start : start + CHUNK_NUMEL]).numel():
        found = zlib.crc32(chunk.view(torch.uint8).numpy().data, found)
        start += CHUNK_NUMEL
    return found
