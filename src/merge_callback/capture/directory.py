"""Snapshots in a directory: one checked file each."""

import json
import os
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from merge_callback.capture.layout import RowLayout
from merge_callback.capture.memory import CaptureSizes, mebibytes, on_devices, required_bytes
from merge_callback.capture.storage import HOST, HostStorage, host_row
from merge_callback.live.sharding import rank
from merge_callback.merging.combine import CHUNK_NUMEL, Row
from merge_callback.utilities.background import Background
from merge_callback.utilities.checks import check_bool
from merge_callback.utilities.files import FlatTensor, atomic_write, read_header, write_safetensors


@dataclass(frozen=True)
class SnapshotDirectory:
    """A directory as the place of snapshots: one file a snapshot and rank, at most ``num_snapshots`` of them.

    Args:
        path: The directory; missing folders are made.
        strict: What happens when a file is missing or corrupt as a merge is made. False leaves the snapshot out with a
            warning, and the merge is made of the others; True is an error.
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
        # The one on its way to the disk.
        return min(num_snapshots, 1)

    def new_storage(
        self, layout: RowLayout, num_snapshots: int, dtype: torch.dtype | None, name: str
    ) -> "DirectoryStorage":
        return DirectoryStorage(layout, dtype, Path(self.path), f"{name}-rank{rank():05d}-")

    def describe(self, layout: RowLayout, num_snapshots: int, dtype: torch.dtype | None, sizes: CaptureSizes) -> str:
        averages = f"{mebibytes(sizes.averages)} {on_devices(layout)}"
        if not num_snapshots:
            return f"in {averages}"
        in_files = mebibytes(sum(required_bytes(layout, num_snapshots, dtype).values()))
        beside = f" and {averages}" if sizes.averages else ""
        in_memory = f"with {mebibytes(sizes.snapshots)} of host memory{beside}"
        return f"in files in {self.path}, up to {in_files} by each rank, {in_memory}"


class DirectoryStorage:
    """Rows in files of a directory: written by a thread of their own, whole or not at all, and checked when read.

    On its way to the disk a row lies in host memory, where it gets as `HostStorage` has it.

    Args:
        layout: Where each tensor lies in a row.
        dtype: Dtype in which snapshots are kept; None keeps each tensor's own.
        folder: Where the files go.
        prefix: What their names begin with, another one for each callback and rank.
    """

    is_merged_in_host_memory = True

    def __init__(self, layout: RowLayout, dtype: torch.dtype | None, folder: Path, prefix: str) -> None:
        self.layout = layout
        self.folder = folder
        self.prefix = prefix
        # Files of the same names may be those of another run.
        self._owner = uuid.uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)
        # One snapshot on its way to the disk; the next one waits until it has arrived.
        self._staged = HostStorage(layout, 1, dtype)
        self._background = Background("snapshots")
        self._steps: dict[int, int] = {}
        # Why the latest write to a slot failed, and which state of a file has been checked already.
        self._failed: dict[int, str] = {}
        self._checked: dict[int, tuple[int, int]] = {}

    @property
    def size_bytes(self) -> int:
        """Bytes of memory: of the one row on its way to the disk."""
        return self._staged.size_bytes

    def path(self, slot: int) -> Path:
        """The file of a slot."""
        return self.folder / f"{self.prefix}{slot:03d}.safetensors"

    def write(self, slot: int, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies live tensors as `HostStorage.write` does; the file is written when this has returned."""
        self._background.wait()
        self._staged.write(0, step, tensors)
        self._start_writing(slot, step)

    def finish(self) -> None:
        """What the GPU does from now on waits for the copy under way."""
        self._staged.finish()

    def row(self, slot: int) -> list[Row]:
        """The row of a slot, read from the file as far as it is asked for."""
        self._background.wait()
        return [FlatTensor(self.path(slot), f"row{group}") for group in range(len(self.layout.groups))]

    def new_row(self) -> list[Tensor]:
        """Room for a merge in host memory."""
        return host_row(self.layout)

    def problem(self, slot: int) -> str | None:
        """Why the snapshot in a slot cannot be used; each file is read through once to find out."""
        self._background.wait()
        if slot in self._failed:
            return self._failed[slot]
        path = self.path(slot)
        try:
            state = path.stat().st_mtime_ns, path.stat().st_size
            if self._checked.get(slot) == state:
                return None
            told = json.loads(read_header(path)[0]["__metadata__"]["snapshot"])
            if told["owner"] != self._owner or told["step"] != self._steps[slot]:
                return f"{path} was written by another run; each needs a directory, or a callback's name, of its own"
            sums = [_checksum(row) for row in self.row(slot)]
        except (OSError, KeyError, ValueError) as error:
            return f"{path} cannot be read: {error}"
        if sums != told["checksums"]:
            return f"{path} is corrupt: its checksum is not the one that was written"
        self._checked[slot] = state
        return None

    def _start_writing(self, slot: int, step: int) -> None:
        self._steps[slot] = step
        self._failed.pop(slot, None)
        self._checked.pop(slot, None)
        self._background.begin(self._write_file, slot, step)

    def _write_file(self, slot: int, step: int) -> None:
        rows = {f"row{group}": row for group, row in enumerate(self._staged.row(0))}
        told = {"owner": self._owner, "step": step, "checksums": [_checksum(row) for row in rows.values()]}
        path = self.path(slot)
        try:
            with atomic_write(path) as unfinished:
                write_safetensors(unfinished, rows, rows.values(), {"snapshot": json.dumps(told)})
        except OSError as error:
            self._failed[slot] = f"{path} could not be written: {error}"


def _checksum(row: Row) -> int:
    found, start = 0, 0
    while (chunk := row[start : start + CHUNK_NUMEL]).numel():
        found = zlib.crc32(chunk.view(torch.uint8).numpy().data, found)
        start += CHUNK_NUMEL
    return found
